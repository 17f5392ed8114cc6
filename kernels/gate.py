"""The resource gate: compile every kernel at published sizes for every architecture, without a GPU, and judge it.

A kernel may ship if it fits into a block's shared memory, keeps everything in registers, and multiplies on tensor
cores. The result depends on Triton's version, so the gate must run with the version that ships.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from tilewright.kernels.ahead import AMD, ARCHS, Resources, compiled, resources
from tilewright.kernels.jit import Launch
from tilewright.kernels.sample import EIGHT_BIT, sample, type_name
from tilewright.kernels.table import Op

__all__ = ["GateRow", "gate", "gate_cases", "resources_and_faults"]

SHORT = (torch.float16, torch.bfloat16)
EIGHT_BIT_FROM = 89  # compute capability


@dataclass(frozen=True)
class GateRow:
    """The verdict on one kernel for one architecture."""

    op: str
    case: str
    type: str
    arch: str
    kernel: str
    resources: Resources | None  # none: the kernel does not compile
    faults: tuple[str, ...]


def gate_cases(ops: Iterable[Op]) -> list[tuple[Op, str, torch.dtype, int | str]]:
    """Every op, case, type and architecture to judge. Compositions of other ops have no kernels."""
    return [
        (op, case, dtype, arch)
        for op in ops
        if op.kernel_launches is not None
        for case in op.cases
        if case != "small"
        for arch in (*ARCHS, AMD)
        for dtype in _types(op, arch)
    ]


def _types(op: Op, arch: int | str) -> tuple[torch.dtype, ...]:
    if isinstance(arch, str):
        return (torch.float16,)
    return (*SHORT, EIGHT_BIT) if op.eight_bit and arch >= EIGHT_BIT_FROM else SHORT


def gate(op: Op, case: str, dtype: torch.dtype, arch: int | str) -> Iterator[GateRow]:
    """Judge every launch of a case. The first launch multiplies, a second one only compares."""
    assert op.kernel_launches is not None
    call = sample(op, case, dtype, "meta")
    launches, _ = op.kernel_launches(*call.arguments, **call.options, arch=80 if isinstance(arch, str) else arch)
    for i, launch in enumerate(launches):
        used, faults = resources_and_faults(launch, arch, multiplies=op.multiplies and i == 0)
        target = arch if isinstance(arch, str) else f"sm_{arch}"
        name = launch.kernel.__name__.strip("_").removesuffix("_kernel")
        yield GateRow(op.name, case, type_name(dtype), target, name, used, tuple(faults))


def resources_and_faults(launch: Launch, arch: int | str, *, multiplies: bool) -> tuple[Resources | None, list[str]]:
    """The resources that a kernel uses, and the reasons why it may not ship."""
    try:
        used = resources(compiled(launch, arch))
    except Exception as error:  # Triton's, LLVM's and the assembler's share no base class
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, [f"does not compile: {lines[-1].strip()}"]
    return used, used.faults(arch, multiplies=multiplies)
