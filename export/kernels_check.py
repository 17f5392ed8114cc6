"""Checking every implementation of every op on this machine against its reference."""

import subprocess
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch

from tilewright.kernels import accuracy
from tilewright.kernels.accuracy import AccuracyRow, Judge
from tilewright.kernels.face import DOMAIN
from tilewright.kernels.jit import triton
from tilewright.kernels.sample import sample, type_name
from tilewright.kernels.table import Op
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.engines import ort

__all__ = ["GET_TRITON", "NO_GPU", "NO_NATIVE", "check", "implementations"]

GET_TRITON = "Triton is not installed: pip install 'triton>=3.6'"
NO_GPU = "no GPU that PyTorch can use"
NO_NATIVE = "not here: install a platform wheel, or make native in a clone"
NO_CUDA = "not built: cmake -S kernels/native -B build/native -DTILEWRIGHT_CUDA=ON"
NATIVE = ("codebook_nearest", "codebook_from_logits", "codebook_from_hidden")  # ops with a native kernel
OF_PARTS = "of its parts"
Progress = Callable[[str, int, int], Any]


def implementations(ops: Sequence[Op]) -> dict[str, Any]:
    """The implementations of each op on this machine, and those that the runtime uses."""
    native = _native(ops)
    rows = [
        {
            "op": op.name,
            "cases": [case for case in op.cases if case != "small"],
            "torch": torch.__version__,
            "triton": _triton() if op.kernel_launches else OF_PARTS,
            "onnx": f"{DOMAIN}::{op.face.name}" if op.face else OF_PARTS,
            "native": native[op.name],
        }
        for op in ops
    ]
    ours = ", ".join(name for name, place in native.items() if place == str(ort.native_library()))
    standard = "ONNX's standard operators"
    used = f"native kernels for {ours}, {standard} for the rest" if ours else standard
    library = ort.NATIVE.with_name("libtilewright_cuda.so")
    plugins = "ahead-of-time plugins, see kernels/tensorrt.py" if find_spec("tensorrt") else "not installed"
    return {
        "ops": rows,
        "runtime": f"the runtime takes {used}",
        "tensorrt": plugins,
        "cuda": str(library) if library.is_file() else NO_CUDA,
    }


def _native(ops: Sequence[Op]) -> dict[str, str]:
    if why := ort.missing():
        return dict.fromkeys((op.name for op in ops), why)
    from tilewright.export.graph.one_node import native_kernels

    library = ort.native_library()
    if library is None:
        return {op.name: NO_NATIVE if op.name in NATIVE else "-" for op in ops}
    with_kernel = native_kernels(library, ops)
    return {op.name: str(library) if op.name in with_kernel else "-" for op in ops}


def _triton() -> str:
    if triton is None:
        return "not installed"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{triton.__version__}, {gpu}"


def check(ops: Sequence[Op], progress: Progress) -> tuple[list[AccuracyRow], dict[str, str]]:
    """A verdict for each implementation, and reasons for those that cannot be judged."""
    absent: dict[str, str] = {}
    rows = [_row(op, dtype) for op in ops for dtype in (torch.float32, torch.float16, torch.bfloat16)]
    if triton is None:
        absent[accuracy.INTERPRETER] = GET_TRITON
    else:
        rows += _interpreted(ops)
    rows += _on_gpu(ops, absent, progress)
    rows += _in_ort(ops, absent)
    order = [op.name for op in ops]
    return sorted(rows, key=lambda row: order.index(row.op)), absent


def _interpreted(ops: Sequence[Op]) -> list[AccuracyRow]:
    try:
        return accuracy.interpreted(ops)
    except subprocess.CalledProcessError as error:
        why = f"does not run: its process ended with {error.returncode}"
        return [AccuracyRow(op.name, "small", accuracy.INTERPRETER, "float32", why=why) for op in ops]


def _row(op: Op, dtype: torch.dtype) -> AccuracyRow:
    return Judge(sample(op, "small", dtype)).row("torch")


def _on_gpu(ops: Sequence[Op], absent: dict[str, str], progress: Progress) -> list[AccuracyRow]:
    if triton is None or not torch.cuda.is_available():
        absent[accuracy.GPU] = GET_TRITON if triton is None else NO_GPU
        return []
    rows: list[AccuracyRow] = []
    calls = [(op, case, dtype) for op in ops for case in op.cases for dtype in accuracy.types_on_gpu(op, case)]
    for done, (op, case, dtype) in enumerate(calls):
        progress("on GPU", done, len(calls))
        try:
            rows.append(accuracy.on_gpu(op, case, dtype))
        except torch.OutOfMemoryError:
            absent[f"{accuracy.GPU}, {op.name} {case}"] = "its reference does not fit this GPU's memory"
        except Exception as error:  # Triton's, CUDA's and PyTorch's share no base class
            why = f"does not run: {one_line(str(error))}"
            rows.append(AccuracyRow(op.name, case, accuracy.GPU, type_name(dtype), why=why))
    return rows


def _in_ort(ops: Sequence[Op], absent: dict[str, str]) -> list[AccuracyRow]:
    if why := ort.missing():
        absent["onnx"] = absent["native"] = why
        return []
    from tilewright.export.graph.one_node import native_kernels

    faced = [op for op in ops if op.face is not None]
    rows = [_called(op, dtype, "onnx") for op in faced for dtype in (torch.float32, torch.float16)]
    if library := ort.native_library():
        native = native_kernels(library, faced)
        rows += [_called(op, torch.float32, "native") for op in faced if op.name in native]
    else:
        absent["native"] = NO_NATIVE
    return rows


def _called(op: Op, dtype: torch.dtype, implementation: str) -> AccuracyRow:
    from tilewright.export.graph.one_node import call_in_ort

    call = sample(op, "small", dtype)
    try:
        results = call_in_ort(call, library=ort.native_library() if implementation == "native" else None)()
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        return AccuracyRow(
            op.name, "small", implementation, type_name(dtype), why=f"does not run: {one_line(str(error))}"
        )
    return Judge(call).row(implementation, results)
