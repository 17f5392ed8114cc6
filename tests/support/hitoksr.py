"""HiTokSR's specification written out in NumPy, read from a network's state dict."""

import math

import numpy as np
import torch
from torch import nn
from torch.nn.functional import conv2d, group_norm, silu

from tilewright.export.networks.hitoksr import HiTokConfig

__all__ = ["Textbook", "made", "random", "stem_by_name", "tokens"]


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights of order one everywhere, so that no term is too small to be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.double().parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
            if parameter.ndim == 1:
                parameter.add_(0.5)
    return network.eval().requires_grad_(False)


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Textbook:
    """The forward of a network's transformer, read from its state dict, with NumPy."""

    def __init__(self, network: nn.Module, config: HiTokConfig) -> None:
        self.weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
        self.heads = config.heads

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        bias = self.weights.get(f"{name}.bias", 0.0)
        return np.einsum("bnc,oc->bno", x, self.weights[f"{name}.weight"]) + bias

    def rms_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + 1e-6) * self.weights[f"{name}.weight"]

    def rotated(self, head: np.ndarray, prefix: int, columns: int) -> np.ndarray:
        """Turn channels j and j + D/2 of a patch's row [D] by its row times a frequency, or by its column."""
        result, width = head.copy(), head.shape[-1]
        for token in range(prefix, head.shape[0]):
            row, column = divmod(token - prefix, columns)
            for j in range(width // 2):
                i = j % (width // 4)
                angle = (row if j < width // 4 else column) * 10_000 ** (-4 * i / width)
                low, high = head[token, j], head[token, j + width // 2]
                result[token, j] = low * math.cos(angle) - high * math.sin(angle)
                result[token, j + width // 2] = high * math.cos(angle) + low * math.sin(angle)
        return result

    def attention(self, x: np.ndarray, name: str, prefix: int, columns: int) -> np.ndarray:
        q, k, v = (self.linear(x, f"{name}.{which}") for which in ("to_q", "to_k", "to_v"))
        width = x.shape[-1] // self.heads
        result = np.zeros_like(x)
        for b in range(len(x)):
            for h in range(self.heads):
                mine = slice(h * width, (h + 1) * width)
                query, key = (self.rotated(t[b, :, mine], prefix, columns) for t in (q, k))
                scores = np.exp(query @ key.T / math.sqrt(width))
                result[b, :, mine] = scores / scores.sum(-1, keepdims=True) @ v[b, :, mine]
        return self.linear(result, f"{name}.to_out")

    def swiglu(self, x: np.ndarray, name: str) -> np.ndarray:
        gate = self.linear(x, f"{name}.gate")
        return self.linear(gate / (1 + np.exp(-gate)) * self.linear(x, f"{name}.up"), f"{name}.down")

    def sft(self, y: np.ndarray, patches: np.ndarray, name: str) -> np.ndarray:
        """Gamma is the first half of what is read from the patches, beta the second; class rows stay."""
        both, result = self.linear(patches, name), y.copy()
        prefix, width = y.shape[1] - patches.shape[1], y.shape[2]
        for row in range(patches.shape[1]):
            gamma, beta = both[:, row, :width], both[:, row, width:]
            result[:, prefix + row] = y[:, prefix + row] * (1 + gamma) + beta
        return result

    def blocks(self, x: np.ndarray, depth: int, columns: int, patches: np.ndarray | None = None) -> np.ndarray:
        prefix = x.shape[1] - patches.shape[1] if patches is not None else 0
        for i in range(depth):
            for norm, sft, branch in (("norm1", "sft1", "attention"), ("norm2", "sft2", "mlp")):
                y = self.rms_norm(x, f"blocks.{i}.{norm}")
                if patches is not None:
                    y = self.sft(y, patches, f"blocks.{i}.{sft}")
                name = f"blocks.{i}.{branch}"
                x = x + (self.attention(y, name, prefix, columns) if branch == "attention" else self.swiglu(y, name))
        return x


def stem_by_name(weights: dict[str, torch.Tensor], config: HiTokConfig, pixels: torch.Tensor) -> torch.Tensor:
    """Convolution by convolution, in the order the weights are numbered."""

    def conv(x, name, **options):
        return conv2d(x, weights[f"stem.{name}.weight"], weights[f"stem.{name}.bias"], **options)

    def norm(x, name):
        groups = config.stem_norm_groups
        return group_norm(x, groups, weights[f"stem.{name}.weight"], weights[f"stem.{name}.bias"], 1e-5)

    x, place = conv(pixels, 0, padding=1), 1
    for level in range(len(config.stem)):
        if level:
            x, place = conv(x, place, stride=2, padding=1), place + 1
        for _ in range(config.stem_blocks):
            h = conv(silu(norm(x, f"{place}.norm1")), f"{place}.conv1", padding=1)
            x, place = x + conv(silu(norm(h, f"{place}.norm2")), f"{place}.conv2", padding=1), place + 1
    return conv(x, place)


def tokens(features: torch.Tensor) -> np.ndarray:
    """Features [B, C, h, w] as rows [B, h*w, C], row-major."""
    return np.stack(
        [features[:, :, y, x].numpy() for y in range(features.shape[2]) for x in range(features.shape[3])], 1
    )
