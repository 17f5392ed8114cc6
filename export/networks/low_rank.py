"""Layers with a low-rank branch, so that a LoRA is added without changing the weights in their files."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["Branches", "LowRank", "LowRankConv", "LowRankOnly", "Strength", "Zero", "add_branches", "terms"]

Branches = Mapping[str, Sequence[float]]  # path of a module -> rank and scale of its branch


@dataclass
class Strength:
    """The caller's strength of the LoRA during one forward, for each tile [B]; not a module, so tracing may set it."""

    value: Tensor | float = 1.0

    def over(self, x: Tensor) -> Tensor | float:
        """The strength as a factor of `x` [B, ...]."""
        return self.value[(..., *[None] * (x.ndim - 1))] if isinstance(self.value, Tensor) else self.value


class LowRank(nn.Linear):
    """W x + b + s B(A x)."""

    def __init__(self, base: nn.Linear, rank: int, scale: float, strength: Strength) -> None:
        super().__init__(base.in_features, base.out_features, base.bias is not None)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank))
        self.scale, self.strength = scale, strength

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.raised(F.linear(x, self.lora_A))

    def raised(self, low: Tensor) -> Tensor:
        """The branch's result from A's."""
        return F.linear(low * (self.scale * self.strength.over(low)), self.lora_B)


def terms(linears: Sequence[nn.Linear], x: Tensor) -> list[Tensor]:
    """The term that each linear layer adds to W x: its bias, and its branch if it has one."""
    return [
        linear.bias + linear.raised(F.linear(x, linear.lora_A)) if isinstance(linear, LowRank) else linear.bias
        for linear in linears
    ]


class LowRankConv(nn.Conv2d):
    """A convolution with a low-rank branch: a convolution of the same size to a few channels, then 1x1."""

    def __init__(self, base: nn.Conv2d, rank: int, scale: float, strength: Strength) -> None:
        size, stride, padding = (base.kernel_size[0], base.stride[0], base.padding[0])
        super().__init__(base.in_channels, base.out_channels, size, stride, padding, bias=base.bias is not None)
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_channels, size, size))
        self.lora_B = nn.Parameter(torch.empty(base.out_channels, rank, 1, 1))
        self.scale, self.strength = scale, strength

    def forward(self, x: Tensor) -> Tensor:
        down = F.conv2d(x, self.lora_A, None, self.stride, self.padding)
        return super().forward(x) + F.conv2d(down * (self.scale * self.strength.over(down)), self.lora_B)


class Zero(nn.Module):
    """A linear layer whose weights are missing in the file: its result is zero, and a LoRA may add to it."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


class LowRankOnly(nn.Module):
    """s B(A x): the branch of a layer whose result is zero."""

    def __init__(self, base: Zero, rank: int, scale: float, strength: Strength) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank))
        self.scale, self.strength = scale, strength

    def forward(self, x: Tensor) -> Tensor:
        low = F.linear(x, self.lora_A)
        return F.linear(low * (self.scale * self.strength.over(low)), self.lora_B)


KINDS: dict[type[nn.Module], Any] = {nn.Conv2d: LowRankConv, nn.Linear: LowRank, Zero: LowRankOnly}


def add_branches(
    root: nn.Module, branches: Branches, strength: Strength, place: Callable[[str], Sequence[str]] = lambda path: [path]
) -> None:
    """Replace modules by ones with branches. `place` names our modules for a path, several if we split the module."""
    unknown = []
    for path, (rank, scale) in branches.items():
        for name in place(path):
            parent, _, child = name.rpartition(".")
            try:
                base = root.get_submodule(name)
            except AttributeError:
                unknown.append(path)
                continue
            kind: Any = next(KINDS[base_kind] for base_kind in KINDS if isinstance(base, base_kind))
            setattr(root.get_submodule(parent), child, kind(base, int(rank), scale, strength))
    if unknown:
        some = f"{', '.join(unknown[:3])}{', ...' if len(unknown) > 3 else ''}"
        raise InputError(
            one_line(
                f"the LoRA adapts {len(unknown)} modules that the network does not have: {some};"
                " give the LoRA of this system and preset"
            )
        )
