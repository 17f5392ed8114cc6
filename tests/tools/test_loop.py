"""A training that was stopped ends with the very weights of one that was not."""

import json

import pytest
import torch
from torch import nn
from train.loop import Average, adam, stage


class Stopped(Exception):
    pass


def train(folder, *, stop_at=None):
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(3, 8), nn.GELU(), nn.Linear(8, 1))
    average = Average(network)
    data = torch.randn(40, 5, 3)

    def losses(step, x):
        if step == stop_at:
            raise Stopped
        return {"fit": (network(x + 0.1 * torch.randn_like(x)) - x.sum(1, keepdim=True)).square().mean()}

    kept = {"network": network, "average": average}
    optimizer = adam(network.parameters())
    stage("fit", folder, 160, 1e-2, optimizer, kept, lambda n: data[n % 40], losses, average.update)
    return average.network.state_dict()


@pytest.mark.slow
def test_a_stop_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.SAVE_EVERY_S", 0)
    expected = train(tmp_path / "whole")
    for stop_at in (7, 8, 121):
        with pytest.raises(Stopped):
            train(tmp_path / "parts", stop_at=stop_at)
    found = train(tmp_path / "parts")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    lines = [json.loads(line) for line in (tmp_path / "whole" / "fit.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 51, 101, 151, 160] and lines[-1]["fit"] < lines[0]["fit"]


def test_what_is_done_is_not_done_again(tmp_path):
    expected = train(tmp_path)
    found = train(tmp_path, stop_at=0)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
