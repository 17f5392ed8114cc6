"""The resource gate, compiling for real in a process of its own: what ships passes, and what should not is refused."""

import json
import subprocess
import sys

import pytest
import torch

from tilewright.kernels import ahead
from tilewright.kernels.gate import gate, gate_cases
from tilewright.kernels.table import KERNELS

pytestmark = pytest.mark.slow

pytest.importorskip("triton", reason="the gate compiles with Triton, which is not installed")

JUDGE = """
import json, sys
from dataclasses import asdict, replace
import torch
from tilewright.kernels.gate import gate, resources_and_faults
from tilewright.kernels.sample import sample
from tilewright.kernels.table import KERNELS

def launch(name, case, arch, constants={}, **changed):
    call = sample(KERNELS[name], case, torch.float16, "meta")
    first = KERNELS[name].kernel_launches(*call.arguments, **call.options, arch=arch)[0][0]
    return replace(first, constants=first.constants | constants, **changed)
"""


def told(code: str) -> list:
    """The lines of JSON that the code prints."""
    ran = subprocess.run([sys.executable, "-c", JUDGE + code], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def shipped() -> dict[tuple[str, str, str], dict]:
    """A few kernels for a few architectures, by kernel, type and architecture."""
    rows = told("""
for name, case, dtype, arch in (
    ("concat_project", "in-token", torch.float16, 80),
    ("concat_project", "in-token", torch.float8_e4m3fn, 89),
    ("codebook_from_hidden", "hitoksr-tile", torch.bfloat16, 90),
    ("codebook_nearest", "hitoksr", torch.float16, 100),
    ("codebook_from_logits", "hitoksr", torch.bfloat16, 120),
    ("codebook_nearest", "hitoksr", torch.float16, "gfx942"),
):
    for row in gate(KERNELS[name], case, dtype, arch):
        print(json.dumps(asdict(row)))
""")
    return {(row["kernel"], row["type"], row["arch"]): row for row in rows}


def test_kernels_that_ship_pass(shipped):
    assert set(shipped) == {
        ("concat_project", "float16", "sm_80"),
        ("concat_project", "float8_e4m3fn", "sm_89"),
        ("codebook_from_hidden", "bfloat16", "sm_90"),
        ("best_of_shares", "bfloat16", "sm_90"),
        ("codebook_nearest", "float16", "sm_100"),
        ("codebook_from_logits", "bfloat16", "sm_120"),
        ("codebook_nearest", "float16", "gfx942"),
    }
    assert [row["faults"] for row in shipped.values()] == [[]] * len(shipped)


def test_what_they_take_is_read_off_the_machine_code(shipped):
    for (kernel, *_), row in shipped.items():
        found = row["resources"]
        assert 8 <= found["registers"] <= 512 and found["spills"] == 0
        assert (found["tensor_core"] > 0) == (kernel not in ("best_of_shares", "codebook_from_logits"))
    # 128 rows and 128 results of 32 channels, 2 bytes each, at least once
    assert shipped["concat_project", "float16", "sm_80"]["resources"]["shared"] >= 2 * 128 * 32 * 2


def test_kernels_that_should_not_ship_are_refused():
    larger, too_deep, wide, odd = told("""
def show(launch, multiplies=True):
    found, faults = resources_and_faults(launch, 89, multiplies=multiplies)
    print(json.dumps([found and asdict(found), faults]))

show(launch("concat_project", "vicr", 89, {"BLOCK_M": 256, "BLOCK_O": 256}, warps=4))
show(launch("codebook_from_hidden", "hitoksr", 89, stages=8))
show(launch("codebook_from_logits", "hitoksr", 89))
show(launch("codebook_nearest", "hitoksr", 89, {"BLOCK_M": 48}))
""")
    assert larger[0]["spills"] > 100 and f"{larger[0]['spills']} spills" in larger[1]
    assert too_deep[0]["shared"] > 101_376
    assert f"{too_deep[0]['shared']} bytes of shared memory, a block has 101376" in too_deep[1]
    assert wide[1] == ["no tensor-core instruction"]  # it compares, and was said to multiply
    assert odd[0] is None and odd[1][0].startswith("does not compile: ")


def test_every_kernel_is_wanted_in_every_type_for_every_architecture():
    all_of_it = [(op.name, case, dtype, arch) for op, case, dtype, arch in gate_cases(KERNELS.values())]
    assert len(set(all_of_it)) == len(all_of_it)
    published = {
        (op.name, case) for op in KERNELS.values() if op.kernel_launches for case in op.cases if case != "small"
    }
    assert {(name, case) for name, case, _, _ in all_of_it} == published
    short = {torch.float16, torch.bfloat16}
    for name, case in published:
        types = short | ({torch.float8_e4m3fn} if KERNELS[name].eight_bit else set())
        found = {arch: {t for *one, t, a in all_of_it if (*one, a) == (name, case, arch)} for *_, arch in all_of_it}
        assert found == {80: short, 86: short, 89: types, 90: types, 100: types, 120: types, "gfx942": {torch.float16}}


def test_a_process_that_interprets_compiles_nothing(monkeypatch):
    monkeypatch.setattr(ahead, "INTERPRETED", True)
    (row,) = gate(KERNELS["codebook_nearest"], "hitoksr", torch.float16, 80)
    assert row.resources is None and "TRITON_INTERPRET=1" in row.faults[0]
