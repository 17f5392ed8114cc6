"""The resource gate: every kernel, at the sizes it is published for, compiled for every architecture without a GPU.

A kernel may ship that fits a block's shared memory, keeps everything in registers and multiplies on tensor cores. What
fits depends on Triton's version: gate with the one that ships.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tilewright.kernels.ahead import AMD, ARCHS, Resources, compiled, resources
from tilewright.kernels.jit import Launch
from tilewright.kernels.sample import EIGHT_BIT, sample, type_name
from tilewright.kernels.table import Op

__all__ = ["Row", "gate", "judged", "wanted"]

SHORT = (torch.float16, torch.bfloat16)
EIGHT_BIT_FROM = 89  # compute capability


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture."""

    op: str
    case: str
    type: str
    arch: str
    kernel: str
    resources: Resources | None  # none: it does not compile
    faults: tuple[str, ...]


def wanted(ops: Iterable[Op]) -> list[tuple[Op, str, torch.dtype, int | str]]:
    """What there is to judge; compositions have no kernels of their own."""
    return [
        (op, case, dtype, arch)
        for op in ops
        if op.plan is not None
        for case in op.cases
        if case != "small"
        for arch in (*ARCHS, AMD)
        for dtype in _types(op, arch)
    ]


def _types(op: Op, arch: int | str) -> tuple[torch.dtype, ...]:
    if isinstance(arch, str):
        return (torch.float16,)
    return (*SHORT, EIGHT_BIT) if op.eight_bit and arch >= EIGHT_BIT_FROM else SHORT


def gate(op: Op, case: str, dtype: torch.dtype, arch: int | str) -> Iterator[Row]:
    """Every launch of a case; the first one does the op's products, a second one only compares."""
    assert op.plan is not None
    call = sample(op, case, dtype, "meta")
    launches, _ = op.plan(*call.arguments, **call.options, arch=80 if isinstance(arch, str) else arch)
    for i, launch in enumerate(launches):
        found, why = judged(launch, arch, multiplies=op.multiplies and i == 0)
        target = arch if isinstance(arch, str) else f"sm_{arch}"
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        yield Row(op.name, case, type_name(dtype), target, name, found, tuple(why))


def judged(launch: Launch, arch: int | str, *, multiplies: bool) -> tuple[Resources | None, list[str]]:
    """What a kernel takes, and why it may not ship."""
    try:
        found = resources(compiled(launch, arch))
    except Exception as error:  # Triton's, LLVM's and the assembler's share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, [f"does not compile: {lines[-1].strip()}"]
    return found, found.faults(arch, multiplies=multiplies)
