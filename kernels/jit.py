"""Triton where it is: the decorator, and a kernel's call as data that is launched here or compiled ahead of time.

A process either compiles kernels or interprets them (TRITON_INTERPRET=1, set before Triton is imported): Triton decides
when it decorates. Without Triton the files still import, and every op takes its plain PyTorch path.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
    tl = SimpleNamespace(constexpr=None)  # what signatures name
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # it warns of every op's missing kernel

__all__ = [
    "INTERPRETED",
    "Launch",
    "arch_of",
    "ceil_div",
    "contiguous",
    "fits_a_block",
    "jit",
    "launches",
    "run",
    "tl",
    "triton",
]

INTERPRETED = triton is not None and not isinstance(tl.zeros, triton.JITFunction)  # as Triton decided for its own


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself where Triton is not installed."""
    return function if triton is None else triton.jit(function)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel; its parameters are inputs, sizes, outputs, constants, in this order.

    Tensors may be on the meta device: then it is a description to compile.
    """

    kernel: Any
    arguments: dict[str, Tensor | int | None]  # none: the kernel is compiled without it
    constants: dict[str, Any]
    grid: tuple[Any, ...]
    warps: int
    stages: int

    def __call__(self) -> None:
        """Run it on the tensors' device."""
        if triton.knobs.runtime.interpret != INTERPRETED:
            raise RuntimeError(
                "TRITON_INTERPRET changed after Triton was imported; a process interprets or compiles: "
                "set it before the first import and start again"
            )
        kernel = self.kernel if INTERPRETED else torch.library.wrap_triton(self.kernel)
        kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def run(launches: list[Launch], outputs: Any) -> Any:
    """The outputs, filled."""
    for launch in launches:
        launch()
    return outputs


def launches(x: Tensor) -> bool:
    """Whether kernels run on this tensor: a GPU's, or any under the interpreter."""
    return triton is not None and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


def fits_a_block(width: int) -> bool:
    """Whether kernels take heads of this width; wider ones would not fit shared memory."""
    return 16 <= width <= 128 and width & (width - 1) == 0


def arch_of(x: Tensor) -> int:
    """Compute capability as 80, 90, ...; the interpreter's and AMD's tiles are those of 80."""
    if not x.is_cuda or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors as kernels read them."""
    return [t if t is None else t.contiguous() for t in tensors]


def ceil_div(n: Any, d: int) -> Any:
    """n / d rounded up."""
    return (n + d - 1) // d
