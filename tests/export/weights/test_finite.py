"""Weights that are no numbers are found wherever they lie, and holes cost nothing."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tilewright.export.weights.finite import CHUNK, nonfinite
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import Reference

KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def references(path: Path) -> dict[str, tuple[Path, Reference]]:
    return {
        name: (path.parent, Reference(path.name, spec.dtype, spec.shape, offset, length))
        for name, (spec, offset, length) in safetensors_header(path).items()
    }


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 777, -1])
def test_one_number_that_is_none_is_found(tmp_path: Path, kind: torch.dtype, value: float, place: int) -> None:
    if kind == torch.float8_e4m3fn:
        value = float("nan")  # it has no infinities
    bad = torch.ones(1001).to(kind)
    bad.view(-1)[place] = torch.tensor(value).to(kind)
    save_file({"a": torch.ones(3, 5).to(kind), "b": bad, "c": torch.ones(()).to(kind)}, tmp_path / "w.safetensors")
    assert nonfinite(references(tmp_path / "w.safetensors")) == (tmp_path / "w.safetensors", "b")


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float8_e5m2], ids=str)
def test_one_is_found_at_every_border_of_what_is_looked_at_together(tmp_path: Path, kind: torch.dtype) -> None:
    each = CHUNK // torch.ones(1).to(kind).element_size()
    for place in (each - 1, each, 2 * each - 1, 2 * each):
        bad = torch.zeros(2 * each + 3).to(kind)
        bad[place] = torch.tensor(float("nan")).to(kind)
        save_file({"w": bad}, tmp_path / "w.safetensors")
        assert nonfinite(references(tmp_path / "w.safetensors")) == (tmp_path / "w.safetensors", "w")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16, torch.float16], ids=str)
def test_every_value_of_a_small_type_is_judged_as_torch_judges_it(tmp_path: Path, kind: torch.dtype) -> None:
    small = torch.ones(1).to(kind).element_size() == 1
    bits = torch.arange(256, dtype=torch.uint8) if small else torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = bits.view(kind)
    finite = values.float().isfinite()
    save_file({"w": values[finite].clone()}, tmp_path / "good.safetensors")
    assert nonfinite(references(tmp_path / "good.safetensors")) is None
    for i in (~finite).nonzero().flatten()[:: 1 if small else 97]:
        save_file({"w": values[i : i + 1].clone()}, tmp_path / "bad.safetensors")
        assert nonfinite(references(tmp_path / "bad.safetensors")) is not None


def test_large_numbers_whole_numbers_and_nothing_are_no_fault(tmp_path: Path) -> None:
    tensors = {
        "large": torch.full((9,), 3e38),
        "whole": torch.full((9,), -1, dtype=torch.int64),
        "flags": torch.ones(3, dtype=torch.bool),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    assert nonfinite(references(tmp_path / "w.safetensors")) is None
    assert nonfinite({}) is None


def test_the_first_of_several_is_told_in_the_order_of_files_and_offsets(tmp_path: Path) -> None:
    found = {}
    for folder in ("two", "one"):
        (tmp_path / folder).mkdir()
        save_file({f"{folder}.{n}": torch.full((2,), torch.nan) for n in "ab"}, tmp_path / folder / "w.safetensors")
        found |= references(tmp_path / folder / "w.safetensors")
    assert nonfinite(found) == (tmp_path / "one" / "w.safetensors", "one.a")


def sparse(path: Path, length: int, data: dict[int, bytes]) -> Reference:
    """A file of one float32 tensor, all a hole but for these bytes at these places of it."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [length // 4], "data_offsets": [0, length]}}).encode()
    header += b" " * (-len(header) % 8 + 1)  # so that numbers lie across the borders of pages
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for at, block in data.items():
            file.seek(8 + len(header) + at)
            file.write(block)
        file.truncate(8 + len(header) + length)
    return references(path)["w"][1]


@pytest.mark.parametrize("at", [4 * k for k in (0, 1021, 1022, 1023, 1024, 5 << 20, (16 << 20) - 1)])
def test_one_is_found_beside_holes(tmp_path: Path, at: int) -> None:
    one = np.float32(1).tobytes()
    for value in (np.float32(np.inf).tobytes(), one):
        reference = sparse(tmp_path / "w.safetensors", 64 << 20, {4 << 20: one, at: value})
        expected = (tmp_path / "w.safetensors", "w") if value != one else None
        assert nonfinite({"w": (tmp_path, reference)}) == expected


def test_stand_ins_of_gigabytes_are_a_moments_work(tmp_path: Path) -> None:
    reference = sparse(tmp_path / "w.safetensors", 24 << 30, {0: bytes(4)})
    if (tmp_path / "w.safetensors").stat().st_blocks * 512 > 1 << 20:
        pytest.skip("this disk keeps no holes")
    length = reference.length // 1000 // 4 * 4
    parts = {
        str(i): (tmp_path, Reference(reference.file, "float32", (length // 4,), reference.offset + i * length, length))
        for i in range(1000)
    }
    start = time.perf_counter()
    assert nonfinite(parts) is None
    assert time.perf_counter() - start < 2
