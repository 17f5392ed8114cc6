"""A network of a few layers that has all that a compiled package must keep: free sizes, choices, constants, one row."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.export.system import ComponentSpec
from tilewright.kernels.codebook_nearest import codebook_nearest
from tilewright.runtime.bundle.program import ANY, TensorSpec
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import Reference

__all__ = ["SPEC", "TYPES", "SmallNetwork", "compile_small", "feed", "small_weights", "stored"]

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


STORED = {"look.weight": "bfloat16", "late.weight": "float16"}  # the others in float32
TYPES = {name: STORED.get(name, "float32") for name in small_weights(0)}


def compile_small(folder: Path) -> None:
    """Write the network's package in float32."""
    from tilewright.export.targets import aoti

    aoti.compile_network(SPEC, TYPES, "float32", folder)


def stored(folder: Path, seed: int) -> tuple[dict[str, tuple[Path, Reference]], dict[str, Tensor]]:
    """Weights in a file of a user, and their values."""
    from tilewright.export.weights.writing import write_tensors

    weights = {name: w.to(getattr(torch, TYPES[name])) for name, w in small_weights(seed).items()}
    specs = {name: TensorSpec(str(w.dtype)[6:], tuple(w.shape)) for name, w in weights.items()}
    file = folder / f"{seed}.safetensors"
    write_tensors(file, specs, (w.view(torch.uint8).numpy().tobytes() for w in weights.values()), "test")
    header = safetensors_header(file).items()
    places = {
        n: (file, Reference(file.name, s.dtype, tuple(map(int, s.shape)), at, length)) for n, (s, at, length) in header
    }
    return places, {name: w.double() for name, w in weights.items()}


def feed(batch: int, height: int, width: int, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of these sizes."""
    random = np.random.default_rng(seed)
    return {
        "image": random.random((batch, 3, height, width), np.float32),
        "time": 9 * random.random(rows, np.float32),
    }
