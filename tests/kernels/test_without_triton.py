"""Without Triton every file imports and every op works; with it, a process interprets or compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tilewright.kernels.codebook_from_logits import kernel_launches

BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Without(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
"""


def in_process(code: str) -> subprocess.CompletedProcess[str]:
    """What Python says to it, with the textbook at hand."""
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", f"import os\n{code}"]
    return subprocess.run(words, env=os.environ | path, capture_output=True, text=True)


@pytest.mark.slow
def test_every_op_works_where_triton_is_not_installed():
    code = """
import torch
import tilewright.kernels.ahead
from support.cases import maker
from support.textbook import assert_right
from tilewright.kernels.jit import triton
from tilewright.kernels.table import KERNELS
assert triton is None
torch.set_num_threads(1)
for name, op in KERNELS.items():
    arguments, attributes = op.cases["small"](maker(torch.float32))
    assert_right(name, op.run(*arguments, **attributes), arguments, attributes)
    print(name)
"""
    done = in_process(BLOCKED + code)
    assert done.returncode == 0, done.stderr
    assert "joint_attention" in done.stdout.split()


def test_a_variable_that_changed_after_import_is_named(monkeypatch):
    pytest.importorskip("triton", reason="there is nothing to launch without Triton")
    launches, _ = kernel_launches(torch.randn(2, 6), torch.randn(2, 3, 4), arch=80)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"TRITON_INTERPRET changed after .* set it before"):
        launches[0]()


CHANGED = {
    "set after Triton": "import triton; os.environ['TRITON_INTERPRET'] = '1'",
    "cleared after Triton": "os.environ['TRITON_INTERPRET'] = '1'; import triton; del os.environ['TRITON_INTERPRET']",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_a_variable_that_changed_between_the_imports_is_named(change):
    pytest.importorskip("triton", reason="there is nothing to launch without Triton")
    code = """
import torch
from tilewright.kernels.codebook_from_logits import kernel_launches
kernel_launches(torch.randn(2, 6), torch.randn(2, 3, 4), arch=80)[0][0]()
"""
    done = in_process(f"{change}\n{code}")
    assert done.returncode == 1 and "RuntimeError: TRITON_INTERPRET changed after Triton was imported" in done.stderr
