"""bfloat16 as the compiler has it.

Triton's interpreter keeps bfloat16 as the 16-bit integers that NumPy can hold, and then multiplies, adds and compares
these integers; and it cuts float32 off where a GPU rounds to the nearest. Both go unnoticed: no error, other numbers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widened(handle: TensorHandle) -> TensorHandle:
    """The same numbers in float32, of which bfloat16 is the upper half."""
    bits = handle.data.astype(np.uint32) << 16
    return TensorHandle(bits.view(np.float32), tl.float32)


def rounded(data: np.ndarray) -> TensorHandle:
    """float32 to the nearest bfloat16, the even one of two; numbers that are none stay none."""
    bits = np.ascontiguousarray(data, np.float32).view(np.uint32)
    upper = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return TensorHandle(np.where(np.isnan(data), np.uint16(0x7FC0), upper).reshape(data.shape), tl.bfloat16)


def is_bfloat16(handle: TensorHandle) -> bool:
    """A pointer to bfloat16 is not."""
    return handle.dtype.scalar == tl.bfloat16


def computed(operation: Callable[..., TensorHandle], operands: int) -> Callable[..., TensorHandle]:
    """An elementwise operation, in float32 where its operands are bfloat16."""

    def apply(self: InterpreterBuilder, *given: Any) -> TensorHandle:
        if not is_bfloat16(given[0]):
            return operation(self, *given)
        wide = [widened(handle) for handle in given[:operands]]
        result = given[-1](*(handle.data for handle in wide))
        return TensorHandle(result, tl.int1) if result.dtype == bool else rounded(result)

    return apply


def repair() -> None:
    """Change the interpreter of this process."""
    builder = InterpreterBuilder
    dot, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        return dot(self, *(widened(handle) if is_bfloat16(handle) else handle for handle in (a, b)), *rest)

    def cast_impl(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            return rounded(source.data)
        return cast(self, source, target)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    builder.unary_op, builder.binary_op = computed(builder.unary_op, 1), computed(builder.binary_op, 2)
