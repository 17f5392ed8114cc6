"""A network of a few layers that has all that a compiled package must keep: free sizes, choices, constants, one row."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.export.system import ComponentSpec
from tilewright.kernels.codebook_nearest import codebook_nearest
from tilewright.runtime.bundle.program import ANY, TensorSpec

__all__ = ["SPEC", "SmallNetwork", "small_weights"]

GROUPS, BOOK, WIDTH = 2, 16, 4


class SmallNetwork(nn.Module):
    """An image and a time to the nearest codes of each pixel of half the size."""

    def __init__(self) -> None:
        super().__init__()
        self.look = nn.Conv2d(3, GROUPS * WIDTH, 3, stride=2, padding=1)
        self.late = nn.Linear(6, GROUPS * WIDTH)
        self.codebook = nn.Parameter(torch.empty(GROUPS, BOOK, WIDTH))
        self.register_buffer("frequencies", torch.arange(1, 4) / 3, persistent=False)
        self.frequencies: Tensor

    def forward(self, image: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        angles = time[:, None] * self.frequencies
        late = self.late(torch.cat([angles.sin(), angles.cos()], 1))
        features = F.silu(self.look(image)) + late[:, :, None, None]
        rows = features.permute(0, 2, 3, 1).flatten(0, 2)
        indices, _ = codebook_nearest(rows, self.codebook)
        batch, _, height, width = features.shape
        return features, indices.reshape(batch, height, width, GROUPS)


SPEC = ComponentSpec(
    SmallNetwork,
    {"image": TensorSpec("float32", ("batch", 3, "height", "width")), "time": TensorSpec("float32", (ANY,))},
    {
        "features": TensorSpec("float32", ("batch", GROUPS * WIDTH, "rows", "columns")),
        "indices": TensorSpec("int32", ("batch", "rows", "columns", GROUPS)),
    },
    {"height": 1, "width": 1, "rows": 2, "columns": 2},
    {"height": 2, "width": 2},
)


def small_weights(seed: int) -> dict[str, Tensor]:
    """Weights for it."""
    random = torch.Generator().manual_seed(seed)
    named: dict[str, Any] = dict(SmallNetwork().named_parameters())
    return {name: 0.3 * torch.randn(parameter.shape, generator=random) for name, parameter in named.items()}
