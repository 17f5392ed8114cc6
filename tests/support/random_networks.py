"""Networks with random weights of order one, random tensors, and how far two tensors are apart."""

import math

import torch
from torch import Tensor, nn

__all__ = ["distance", "made", "random"]


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights of order one everywhere, so that no term is too small to be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return network.eval().requires_grad_(False)


def distance(ours: Tensor, expected: Tensor) -> float:
    """Relative L2."""
    assert ours.shape == expected.shape
    return float((ours.double() - expected.double()).norm() / expected.double().norm())
