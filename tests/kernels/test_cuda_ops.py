"""The CUDA ops without a GPU: all that the library does around a kernel, with a driver that stands in for NVIDIA's.

The library is built for the CPU provider, and a launch calls a function here, which reads and writes the memory that
its parameters point to. It takes them as the kernel's own plan has them: other sizes, another order or grid would show.
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.cuda_node import Call, built, cuda_headers, refusal, run, run_on_arrays, session, small
from tilewright.kernels import cubins
from tilewright.kernels.jit import triton
from tilewright.kernels.table import KERNELS

pytestmark = [
    pytest.mark.slow,  # the library is compiled first
    pytest.mark.skipif(triton is None, reason="only Triton makes cubins"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="NVIDIA's own driver is here; tests/gpu runs on it"),
]
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32


def made(*shape: int, dtype: torch.dtype = F16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def others() -> dict[str, Call]:
    """Inputs left out, given by row, or of other types and ranks than in the table's cases."""
    weights = [made(32, 40) for _ in range(3)]
    attributes = {"heads": 2, "epsilon": 1e-5, "interleaved": False}
    by_row, tables = [made(2, 9, 32) for _ in range(3)], [made(7, 8) for _ in range(2)]
    sources = (made(2, 9, 24), made(2, 9, 16), *weights, *by_row, None, None, *tables)
    return {
        "terms by row": (KERNELS["concat_project"], (made(2, 3, 40), made(2, 3, 24), made(96, 64), made(2, 3, 96)), {}),
        "two sources": (KERNELS["qkv_norm_rope"], sources, attributes),
        "projections only": (KERNELS["qkv_norm_rope"], (made(2, 9, 40), None, *weights), attributes),
        "an image": (KERNELS["codebook_from_hidden"], (made(2, 3, 5, 32), made(64, 32), None, made(2, 32, 4)), {}),
        "one vector": (KERNELS["codebook_nearest"], (made(8), made(2, 32, 4)), {}),
    }


CALLS = {
    **{op.face.name: small(op.name, F16) for op in KERNELS.values() if op.face is not None},
    "float32": small("codebook_nearest", F32),
    "bfloat16": small("codebook_from_hidden", BF16),
    "bfloat16 with float32 tables": small("qkv_norm_rope", BF16),
    **others(),
}


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Loaded under the name of NVIDIA's, it is what the library opens."""
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    words = ["c++", "-std=c++17", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", f"-I{cuda_headers()}", "-o", path]
    subprocess.run([*words, Path(__file__).parent / "cuda" / "driver.cc"], check=True)
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def library(driver: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library for the CPU provider, with cubins for all calls beside it."""
    assert "TILEWRIGHT_CUBINS" not in os.environ
    path = built(tmp_path_factory.mktemp("on-cpu"), "-DCMAKE_CXX_FLAGS=-DTILEWRIGHT_ON_CPU")
    cubins.write(path.parent / "cubins", [cubins.words_of(*call, 90) for call in CALLS.values()])
    return path


class Kernels:
    """What the driver runs: the op's reference, on parameters as the plan orders them."""

    def __init__(self, call: Call) -> None:
        self.op, self.arguments, self.options = call
        shares = {"shares": 1} if self.op.name == "codebook_from_hidden" else {}
        (self.planned,), _ = self.op.kernel_launches(*self.arguments, **self.options, **shares, arch=90)
        self.launched: int = 0
        self.problem: Exception | None = None

    def __call__(self, kernel: bytes, grid: Any, threads: int, shared: int, parameters: Any) -> None:
        self.launched += 1
        try:
            assert kernel.decode() == self.planned.kernel.fn.__name__ and threads == 32 * self.planned.warps
            assert tuple(grid[:3]) == (*self.planned.grid, 1, 1)[:3]
            self.fill(parameters)
        except Exception as problem:  # none can pass through C++
            self.problem = problem

    def fill(self, parameters: Any) -> None:
        taken = [argument for argument in self.planned.arguments.values() if argument is not None]
        tensors = []
        for place, argument in zip(parameters, taken, strict=False):
            if isinstance(argument, int):
                assert ctypes.c_int32.from_address(place).value == argument
            else:
                tensors.append(tensor_at(ctypes.c_void_p.from_address(place).value, argument))
        for scratch in parameters[len(taken) : len(taken) + 2]:
            assert ctypes.c_void_p.from_address(scratch).value is None
        here = iter(tensors)
        given = [None if argument is None else next(here) for argument in self.arguments]
        for received, sent in zip(given, self.arguments, strict=True):
            assert sent is None or torch.equal(received, sent)
        for written, result in zip(here, several(self.op.reference(*given, **self.options)), strict=True):
            written.copy_(result)


def tensor_at(address: int | None, like: Tensor) -> Tensor:
    """The memory there, in place."""
    assert address is not None
    memory = (ctypes.c_char * (like.numel() * like.element_size())).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def several(values: Any) -> list[Tensor]:
    return [values] if isinstance(values, Tensor) else list(values)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_call_reaches_its_kernel_as_planned_and_its_results_come_back(call, driver, library):
    op, arguments, options = call
    kernels = Kernels(call)
    c_uint = ctypes.c_uint
    function = ctypes.CFUNCTYPE(
        None, ctypes.c_char_p, ctypes.POINTER(c_uint), c_uint, c_uint, ctypes.POINTER(ctypes.c_void_p)
    )
    called = function(kernels)
    driver.stand_in(called)
    engine = session(library, call)
    for launches in (1, 2):
        found = run(engine, call)
        assert kernels.problem is None, repr(kernels.problem)
        assert kernels.launched == launches and driver.contexts_left() == 0
    for result, truth in zip(found, several(op.reference(*arguments, **options)), strict=True):
        assert torch.equal(result, truth.to(result.dtype))


def test_no_rows_need_no_kernel(driver, library):
    driver.stand_in(None)  # a launch would fail
    for name, arguments, shapes in [
        ("codebook_nearest", (made(0, 8), made(2, 32, 4)), [(0, 2), (0, 8)]),
        ("codebook_from_hidden", (made(2, 0, 32), made(64, 32), None, made(2, 32, 4)), [(2, 0, 2), (2, 0, 8)]),
        ("concat_project", (made(2, 0, 40), made(2, 0, 24), made(96, 64), made(96)), [(2, 0, 96)]),
    ]:
        call = KERNELS[name], arguments, {}
        assert [array.shape for array in run_on_arrays(session(library, call), call)] == shapes


def test_sizes_without_a_cubin_are_answered_with_the_command_that_makes_it(library, tmp_path):
    line = refusal(library, CALLS["CodebookNearest"], codebook=torch.zeros(4, 64, 8, dtype=F16))
    command, words = line.split("make it with: ")[1].rstrip("'").split(" '")
    assert command == f"python -m tilewright.kernels.cubins -o {library.parent / 'cubins'}"
    assert words == "op=CodebookNearest arch=90 inputs=float16,float16 G=4 K=64 D=8"
    assert cubins.main(["-o", str(tmp_path), words]) == 0


@pytest.mark.parametrize(
    ("op", "changed", "said"),
    [
        ("ConcatProject", {"c": (2, 69, 24)}, "c [2, 69, 24] must be [2, 70, 24]"),
        ("ConcatProject", {"weight": (96, 63)}, "weight [96, 63] has fewer columns than x and c: 64"),
        ("ConcatProject", {"h": (95,)}, "h [95] must be [96]"),
        ("ConcatProject", {"h": (1, 70, 96)}, "h [1, 70, 96] must be [2, 70, 96]"),
        ("QkvNormRope", {"wk": (96, 95)}, "wk [96, 95] must be [96, 96]"),
        ("QkvNormRope", {"hv": (95,)}, "hv [95] must be [96]"),
        ("QkvNormRope", {"norm_k": (31,)}, "norm_k [31] must be [32]"),
        ("QkvNormRope", {"sin": (65, 32)}, "sin [65, 32] must be [65, 16]"),
        ("QkvNormRope", {"cos": (71, 16)}, "cos turns 71 tokens, x has 70"),
        ("QkvNormRope", {"wq": (95, 96)}, "wq has 95 rows, which 3 heads do not share"),
        ("JointAttention", {"v2": (2, 2, 99, 64)}, "v2 [2, 2, 99, 64] must be [2, 2, 100, 64]"),
        ("JointAttention", {"q2": (2, 3, 100, 64)}, "q2 [2, 3, 100, 64] must be [2, 2, 100, 64]"),
        ("JointAttention", dict.fromkeys(("q1", "k1", "v1"), (2, 2, 0, 64)), "a segment without tokens"),
        ("CodebookNearest", {"latents": (150, 31)}, "latents [150, 31] must be [150, 32]"),
        ("CodebookFromLogits", {"logits": (150, 1999)}, "logits [150, 1999] must be [150, 2000]"),
        ("CodebookFromLogits", {"codebook": (4, 4000)}, "codebook [4, 4000] has 2 axes, not 3"),
        ("CodebookFromHidden", {"weight": (2000, 95)}, "weight [2000, 95] must be [2000, 96]"),
        ("CodebookFromHidden", {"bias": (1999,)}, "bias [1999] must be [2000]"),
    ],
)
def test_inputs_that_do_not_fit_never_reach_a_kernel(op, changed, said, library):
    tensors = {
        n: s if s is None else torch.zeros(s, dtype=F32 if n in ("cos", "sin") else F16) for n, s in changed.items()
    }
    assert f"tilewright::{op}: " in (line := refusal(library, CALLS[op], **tensors)) and said in line


def test_memory_that_kernels_cannot_read_is_refused(library):
    op, (latents, codebook), _ = CALLS["CodebookNearest"]
    moved = torch.cat([latents.new_zeros(1), latents.flatten()])[1:].view(latents.shape)
    call = op, (moved, codebook), {}
    with pytest.raises(Exception, match="a tensor does not begin at a multiple of 16 bytes"):
        run(session(library, call), call)


LINE = "op=A arch=90 inputs=- kernel=k file=f threads=128 shared=0 parameters=p scratch=2 BLOCK_M=8"


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "manifest.txt is not there; python -m tilewright.kernels.cubins -o "),
        ("", "does not begin with 'tilewright cubins 1': make it again"),
        ("tilewright cubins 2\n", "does not begin with 'tilewright cubins 1': make it again"),
        (f"tilewright cubins 1\n{LINE}\n{LINE.split(' kernel')[0]}\n", "manifest.txt:3: kernel is missing"),
        (f"tilewright cubins 1\n{LINE.replace('threads', 'thread')}\n", "manifest.txt:2: threads is missing"),
        (f"tilewright cubins 1\n{LINE.replace('=128', '=12x')}\n", "manifest.txt:2: threads=12x is not a size"),
        (f"tilewright cubins 1\n{LINE.replace('=128', '=-1')}\n", "manifest.txt:2: threads=-1 is not a size"),
        (f"tilewright cubins 1\n{LINE.replace('file=f', 'file=')}\n", "manifest.txt:2: kernel, file or parameters"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(manifest, said, library, tmp_path, monkeypatch):
    if manifest is not None:
        (tmp_path / "manifest.txt").write_text(manifest)
    monkeypatch.setenv("TILEWRIGHT_CUBINS", str(tmp_path))
    fresh = shutil.copy(library, tmp_path / "fresh.so")  # one that has read no manifest yet
    assert said in refusal(fresh, CALLS["CodebookNearest"])


def test_a_cubin_that_is_not_there_or_no_code_or_of_another_version_is_refused(driver, library, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CUBINS", str(tmp_path))
    call = CALLS["CodebookNearest"]
    words = cubins.words_of(*call, 90)
    (tmp_path / "manifest.txt").write_text(f"tilewright cubins 1\n{words} {LINE[LINE.index('kernel') :]}\n")
    first = shutil.copy(library, tmp_path / "first.so")
    assert "k takes p, this library gives ppipp: make the cubins with the version" in refusal(first, call)
    (tmp_path / "manifest.txt").write_text((tmp_path / "manifest.txt").read_text().replace("=p ", "=ppipp "))
    second = shutil.copy(library, tmp_path / "second.so")
    assert f"cannot read {tmp_path / 'f'}, which the manifest names" in refusal(second, call)
    (tmp_path / "f").write_bytes(b"no code")
    assert f"loading {tmp_path / 'f'}: CUDA_ERROR_OF_THE_TEST" in refusal(second, call)
    assert driver.contexts_left() == 0


ALONE = """
import ctypes, sys
from support.cuda_node import refusal, small, torch
try:
    ctypes.CDLL("libcuda.so.1")
except OSError:
    print(refusal(sys.argv[1], small("codebook_nearest", torch.float16)))
"""


def test_without_a_driver_the_first_kernel_says_so(library):
    path = {"PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", ALONE, library]
    said = subprocess.run(words, env=os.environ | path, capture_output=True, text=True, check=True).stdout
    if not said:
        pytest.skip("a driver is installed here")
    assert "no libcuda.so.1: CUDA kernels need NVIDIA's driver" in said


def test_the_library_that_ships_loads_without_a_driver_and_a_session_without_cuda_refuses_its_ops(tmp_path):
    with pytest.raises(Exception, match=r"Could not find an implementation for CodebookNearest\(1\)"):
        session(built(tmp_path), CALLS["float32"])
