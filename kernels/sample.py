"""Arguments for an op's cases: seeded random tensors, or tensors without data on the meta device."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels.face import plain
from tilewright.kernels.table import Op

__all__ = ["Sample", "sample", "type_name"]

EIGHT_BIT = torch.float8_e4m3fn
IN_EIGHT_BIT = {"x", "c", "hidden", "weight"}  # inputs that an op multiplies; all others stay in bfloat16


@dataclass(frozen=True)
class Sample:
    """One call of an op."""

    op: Op
    case: str
    dtype: torch.dtype
    arguments: tuple[Any, ...]
    options: dict[str, Any]


def sample(op: Op, case: str, dtype: torch.dtype, device: str = "cpu") -> Sample:
    """The call of a case; on the same device it always has the same numbers."""
    meta = device == "meta"
    generator = None if meta else torch.Generator(device).manual_seed(0)
    wide = torch.bfloat16 if dtype == EIGHT_BIT else dtype

    def make(*sizes: int, dtype: torch.dtype = wide) -> Tensor:
        if meta:
            return torch.empty(sizes, dtype=dtype, device=device)
        return torch.randn(sizes, generator=generator, device=device).to(dtype)

    arguments, options = op.cases[case](make)
    if dtype == EIGHT_BIT:
        assert op.eight_bit and op.face is not None
        named = zip(plain(op.face.inputs), arguments, strict=False)
        arguments = tuple(a.to(EIGHT_BIT) if name in IN_EIGHT_BIT and a is not None else a for name, a in named)
        options = options | {"scale": torch.full((), 0.5, device=device)}
    return Sample(op, case, dtype, arguments, options)


def type_name(dtype: torch.dtype) -> str:
    """The name of a type: float32."""
    return str(dtype).removeprefix("torch.")
