"""The library of CUDA ops on a GPU.

In ONNX Runtime's CUDA provider; and, with any ONNX Runtime, its build for the CPU provider on pinned memory, which
host and GPU address alike: only whose stream it is differs.
"""

from pathlib import Path

import onnxruntime as ort
import pytest
import torch

from support.cuda_node import Call, built, run, session, small
from support.textbook import assert_right
from tilewright.kernels import cubins
from tilewright.kernels.jit import arch_of
from tilewright.kernels.table import KERNELS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
OPS = [name for name, op in KERNELS.items() if op.face is not None]
CALLS = {f"{name}-{kind}": small(name, dtype) for name in OPS for kind, dtype in cubins.TYPES.items()}
EACH = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cubins for this GPU."""
    folder = tmp_path_factory.mktemp("cubins")
    arch = arch_of(torch.zeros(1, device="cuda"))
    cubins.write(folder, [cubins.words_of(*call, arch) for call in CALLS.values()])
    return folder


@pytest.fixture(scope="module")
def library(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one that ships."""
    return beside(compiled, built(tmp_path_factory.mktemp("cuda")))


@pytest.fixture(scope="module")
def on_cpu(compiled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for the CPU provider."""
    return beside(compiled, built(tmp_path_factory.mktemp("on-cpu"), "-DCMAKE_CXX_FLAGS=-DTILEWRIGHT_ON_CPU"))


def beside(folder: Path, library: Path) -> Path:
    (library.parent / "cubins").symlink_to(folder)
    return library


def assert_as_the_textbook(call: Call, found: list[torch.Tensor]) -> None:
    op, arguments, options = call
    assert_right(op.name, [result.cpu() for result in found], arguments, options, sums_in=torch.float32)


@EACH
def test_the_cuda_provider_runs_the_op(call: Call, library: Path) -> None:
    provider = "CUDAExecutionProvider"
    if provider not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider: pip install onnxruntime-gpu")
    op, arguments, options = call
    there = op, tuple(a if a is None else a.cuda() for a in arguments), options
    engine = session(library, there, provider)
    if engine.get_providers()[0] != provider:
        pytest.skip("ONNX Runtime's CUDA provider does not load here")
    torch.cuda.synchronize()
    found = run(engine, there, "cuda", lambda t: torch.full_like(t, -1, device="cuda"))
    torch.cuda.synchronize()
    assert_as_the_textbook(call, found)


@EACH
def test_the_library_launches_its_cubins(call: Call, on_cpu: Path) -> None:
    op, arguments, options = call
    pinned = op, tuple(a if a is None else a.pin_memory() for a in arguments), options
    torch.zeros(1, device="cuda")  # makes the GPU's context this thread's
    found = run(session(on_cpu, pinned), pinned, "cpu", lambda t: torch.full_like(t, -1).pin_memory())
    torch.cuda.synchronize()
    assert_as_the_textbook(call, found)
