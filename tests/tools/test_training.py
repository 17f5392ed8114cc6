"""The parts of training, at tiny sizes: what they compute, and that what comes out is what the systems read."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from train import data, hitoksr, in_token
from train.command import write

from tilewright.export.build.attachment import check_attachment, missing_tensors, origins_of
from tilewright.export.build.request import Request
from tilewright.export.networks.flux import Modulate, Step
from tilewright.export.systems.flux import sizes as flux_sizes
from tilewright.export.systems.hitoksr.sizes import PRESETS

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def inference_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training takes the networks' op away, which has no gradient; what is set here is put back."""
    monkeypatch.setattr(hitoksr.networks, "qkv_norm_rope", hitoksr.networks.qkv_norm_rope)


def test_a_coarse_image_is_haars_approximation():
    image = torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    level = image
    for _ in range(2):  # a level's approximation is the sum over pairs, by root two, twice
        level = (level[..., ::2] + level[..., 1::2]) / 2**0.5
        level = (level[..., ::2, :] + level[..., 1::2, :]) / 2**0.5
    expected = level.repeat_interleave(4, 2).repeat_interleave(4, 3) / 4
    assert torch.allclose(hitoksr.coarse(image, 2), expected, atol=1e-6)
    assert torch.equal(hitoksr.coarse(image, 0), image)


def test_strokes_are_histograms_of_directions_and_mean_colours():
    image = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    found = hitoksr.strokes_of(image, 4)
    assert found.shape == (1, 4, hitoksr.ORIENTATIONS + 3)
    light = image.mean(1)[0].numpy()
    for token, (top, left) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        bins = np.zeros(hitoksr.ORIENTATIONS)
        for i in range(top, top + 4):
            for j in range(left, left + 4):
                across = light[i, j + 1] - light[i, j] if j < 7 else 0.0
                down = light[i + 1, j] - light[i, j] if i < 7 else 0.0
                turn = np.arctan2(down, across) / np.pi % 1
                bins[min(int(turn * len(bins)), len(bins) - 1)] += np.hypot(across, down)
        assert np.allclose(found[0, token, :-3], np.sqrt(bins / 16), atol=1e-5)
        assert torch.allclose(found[0, token, -3:], image[0, :, top : top + 4, left : left + 4].mean((1, 2)), atol=1e-6)


@pytest.fixture
def few_images(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(data, "DRAWN", dict.fromkeys(data.DRAWN, 1))
    data.images.cache_clear()
    yield
    data.images.cache_clear()


@pytest.fixture
def tiny_hitoksr(monkeypatch, tmp_path, few_images) -> hitoksr.Training:
    monkeypatch.setitem(PRESETS, "demo", PRESETS["tiny"])
    monkeypatch.setattr(hitoksr, "STEPS", dict.fromkeys(hitoksr.STEPS, 2))
    monkeypatch.setattr(hitoksr, "SIDE", 32)
    return hitoksr.Training(tmp_path / "state")


def test_codewords_become_the_means_of_what_chose_them(tiny_hitoksr):
    tokenizer = tiny_hitoksr.tokenizer
    groups, codes, width = tokenizer.quantizer.codebook.shape
    centres = torch.randn(groups, codes, width, generator=torch.Generator().manual_seed(2)) * 10
    tokenizer.quantizer.codebook.copy_(centres)
    latents = centres.transpose(0, 1).flatten(1)[:, None].repeat(1, 30, 1) + 1.5  # 30 of each, all beside their centre
    indices, _ = tokenizer.quantizer(centres.transpose(0, 1).flatten(1)[:, None].repeat(1, 30, 1))
    tokenizer.follow(latents, indices)
    assert torch.allclose(tokenizer.quantizer.codebook, centres + 1.5, atol=2e-5)


def test_the_shipped_configuration_is_the_one_that_training_writes(tmp_path):
    shipped = (ROOT / "demo" / "hitoksr" / "config.json").read_text()
    assert shipped == hitoksr.Training(tmp_path).files()["config.json"]


@pytest.mark.slow
def test_every_stage_of_hitoksr_runs_and_the_system_finds_all_it_needs(tiny_hitoksr, tmp_path):
    tiny_hitoksr.run()
    again = hitoksr.Training(tiny_hitoksr.folder)
    again.run()  # of what is done, nothing is done again
    tensors, repeated = (training.files()["hitoksr"] for training in (tiny_hitoksr, again))
    assert all(torch.equal(tensors[name], repeated[name]) for name in tensors)
    write(tiny_hitoksr.files(), tmp_path / "w")
    needed(Request("hitoksr", None, tmp_path / "b", tmp_path / "w"))


@pytest.fixture
def tiny_in_token(monkeypatch, tmp_path) -> in_token.Training:
    monkeypatch.setitem(flux_sizes.PRESETS, "demo", flux_sizes.PRESETS["tiny"])
    monkeypatch.setattr(in_token, "SIZES", flux_sizes.PRESETS["tiny"])
    return in_token.Training(tmp_path / "state")


@pytest.mark.slow
def test_both_stages_of_in_token_run_and_the_system_finds_all_it_needs(monkeypatch, tmp_path, few_images):
    monkeypatch.setattr(in_token, "STEPS", dict.fromkeys(in_token.STEPS, 2))
    monkeypatch.setattr(in_token, "SIDE", 32)
    training = in_token.Training(tmp_path / "state")
    training.run()
    write(training.files(), tmp_path / "w")
    needed(Request("in-token", None, tmp_path / "b", tmp_path / "w"))


def test_the_shipped_configuration_files_are_those_that_training_writes():
    for name, text in in_token.config_files().items():
        assert (ROOT / "demo" / "in-token" / name).read_text() == text


def test_the_first_velocity_leads_from_noise_to_what_the_encoder_saw():
    torch.manual_seed(5)
    model = in_token.Conditioned()
    z, y = torch.randn(2, 2, in_token.SIZES.channels, 24, 24)
    image = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        velocity = model(z, y, torch.ones(2), model.tokens(image))
    assert (velocity - (z - y)).square().mean() < 0.01 * (z - y).square().mean()


def test_what_is_trained_is_the_step_that_is_deployed(tiny_in_token):
    model, sizes = tiny_in_token.conditioned, flux_sizes.PRESETS["tiny"]
    random = torch.Generator().manual_seed(4)
    for parameter in model.parameters():  # training begins with blocks that do nothing
        nn.init.normal_(parameter, std=0.2, generator=random)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    z, y, image = made(2, sizes.channels, 6, 8), made(2, sizes.channels, 6, 8), torch.rand(2, 3, 24, 32)
    sigma, following = torch.tensor([0.6]), torch.tensor([0.4])
    step, modulate = Step(sizes.transformer), Modulate(sizes.transformer)
    weights = model.transformer.state_dict()
    for kind in ("weight", "bias"):
        halves = weights.pop(f"norm_out.linear.{kind}").chunk(2)
        weights |= {
            f"norm_out.linear.{name}.{kind}": half for name, half in zip(("scale", "shift"), halves, strict=True)
        }
    for network in (step, modulate):
        network.transformer.load_state_dict(weights, strict=False)
    with torch.no_grad():
        seen = model.tokens(image)
        velocity = model(z, y, sigma.expand(2), seen)
        rows = modulate(model.pooled, torch.tensor([in_token.GUIDANCE]), sigma[None])[:, 0]
        words = sizes.words
        found = step(z, y, model.prompt, sigma, following, seen=seen[:, words:], modulation=rows)
    assert torch.allclose(found, z + (following - sigma) * velocity, atol=2e-5)


def needed(request: Request) -> None:
    """Every parameter of every component is in the files, with its shape; a missing or odd one is refused."""
    check_attachment(request)
    assert not missing_tensors(request, origins_of(request, request.used))
