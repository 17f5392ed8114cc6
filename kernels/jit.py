"""Triton, if it is installed: its decorator, and `Launch`, a kernel's call as data to run or to compile.

A process either compiles kernels or interprets them. Triton decides that when it is imported (TRITON_INTERPRET=1).
Without Triton these files still import, and every op takes its plain PyTorch path.
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
    tl = SimpleNamespace(constexpr=None)  # the only name in signatures
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # PyTorch warns about every missing kernel

__all__ = [
    "INTERPRETED",
    "Launch",
    "arch_of",
    "ceil_div",
    "contiguous",
    "fits_a_block",
    "jit",
    "run",
    "runs_kernels",
    "tl",
    "triton",
]

INTERPRETED = triton is not None and not isinstance(tl.zeros, triton.JITFunction)  # Triton's decision at import


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, or the function itself if Triton is not installed."""
    return function if triton is None else triton.jit(function)


@dataclass(frozen=True)
class Launch:
    """One call of a kernel. Its parameters are inputs, sizes, outputs and constants, in this order.

    With tensors on the meta device it can only be compiled, not run.
    """

    kernel: Any
    arguments: dict[str, Tensor | int | None]  # none: the kernel is compiled without this argument
    constants: dict[str, Any]
    grid: tuple[Any, ...]
    warps: int
    stages: int

    def __call__(self) -> None:
        """Run the kernel on the tensors' device."""
        if triton.knobs.runtime.interpret != INTERPRETED:
            raise RuntimeError(
                "TRITON_INTERPRET changed after Triton was imported; a process interprets or compiles: "
                "set it before the first import and start again"
            )
        kernel = self.kernel if INTERPRETED else torch.library.wrap_triton(self.kernel)
        kernel[self.grid](**self.arguments, **self.constants, num_warps=self.warps, num_stages=self.stages)


def run(launches: list[Launch], outputs: Any) -> Any:
    """Run the launches, and return the outputs that they fill."""
    for launch in launches:
        launch()
    return outputs


def runs_kernels(x: Tensor) -> bool:
    """Whether our kernels run on this tensor: it is on a GPU, or the process interprets kernels."""
    return triton is not None and (x.is_cuda or (INTERPRETED and x.device.type == "cpu"))


def fits_a_block(width: int) -> bool:
    """Whether kernels accept heads of this width; wider heads would not fit into shared memory."""
    return 16 <= width <= 128 and width & (width - 1) == 0


def arch_of(x: Tensor) -> int:
    """The compute capability as 80, 90, ...; 80 also for the interpreter and AMD, which use the same tiles."""
    if not x.is_cuda or torch.version.hip:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors in the contiguous layout that kernels read."""
    return [t if t is None else t.contiguous() for t in tensors]


def ceil_div(n: Any, d: int) -> Any:
    """n / d rounded up."""
    return (n + d - 1) // d
