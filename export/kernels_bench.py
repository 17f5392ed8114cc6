"""The time of ops at published sizes: native kernels in ONNX Runtime, Triton's on a GPU, and the code they replace."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tilewright.export.kernels_check import GET_TRITON, NO_GPU, NO_NATIVE
from tilewright.kernels.accuracy import without_kernels
from tilewright.kernels.jit import triton
from tilewright.kernels.sample import sample
from tilewright.kernels.table import Op
from tilewright.kernels.timing import RUNS, medians
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines import ort

__all__ = ["bench", "on_cpu", "on_gpu"]

TimingRow = dict[str, Any]


def bench(ops: Sequence[Op], progress: Callable[[str, int, int], Any]) -> list[TimingRow]:
    """One row for each case: median seconds of each contender, or the reason why there are none."""
    cases = [(op, case) for op in ops for case in op.cases if case != "small"]
    rows = []
    for done, (op, case) in enumerate(cases):
        progress("cases", done, len(cases))
        rows.append({"op": op.name, "case": case, "cpu": on_cpu(op, case), "gpu": on_gpu(op, case)})
    return rows


def on_cpu(op: Op, case: str, *, runs: int = RUNS) -> dict[str, float] | str:
    """The native kernel and the standard operators in ONNX Runtime, in float32 with constant weights."""
    if why := ort.missing():
        return why
    from tilewright.export.graph.one_node import call_in_ort, native_kernels

    library = ort.native_library()
    if library is None:
        return NO_NATIVE
    if not native_kernels(library, [op]):
        return "no native kernel"
    call = sample(op, case, torch.float32)
    contenders = {
        "native": call_in_ort(call, library=library, constant=True),
        "standard operators": call_in_ort(call, constant=True),
    }
    return medians(contenders, runs=runs)


def on_gpu(op: Op, case: str, *, runs: int = RUNS) -> dict[str, float] | str:
    """Our kernels, eager PyTorch and `torch.compile` in bfloat16, timed by CUDA events."""
    if triton is None or not torch.cuda.is_available():
        return GET_TRITON if triton is None else NO_GPU
    call = sample(op, case, torch.bfloat16, "cuda")

    def ours() -> Any:
        return op.run(*call.arguments, **call.options)

    def eager() -> Any:
        with without_kernels():
            return op.run(*call.arguments, **call.options)

    # a later process must not find this code in PyTorch's cache, as it would take it for our kernels
    torch.compiler.config.force_disable_caches = True
    torch.compiler.reset()  # PyTorch stops compiling after a few cases otherwise
    compiled = torch.compile(lambda: op.run(*call.arguments, **call.options))

    def compiled_plain() -> Any:
        with without_kernels():
            return compiled()

    try:
        with torch.no_grad():
            return medians({"triton": ours, "eager": eager, "torch.compile": compiled_plain}, runs=runs, gpu=True)
    except Exception as error:  # Triton's, CUDA's and PyTorch's share no base class
        return f"does not run: {one_line(str(error))}"
