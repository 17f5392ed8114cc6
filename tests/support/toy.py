"""The toy system, which comes in a package of its own, and its bundle with compiled engines."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["BUILD", "PACKAGES", "SHAPES", "fill", "importable"]

PACKAGES = Path(__file__).parents[1] / "export" / "toy" / "packages"
SHAPES = {"look.weight": (6, 3, 3, 3), "look.bias": (6,), "mix.weight": (12, 6), "mix.bias": (12,)}
BUILD = ("export", "build", "toy", "--weights")


@contextmanager
def importable() -> Iterator[None]:
    """Let builds import the toy's package."""
    sys.path.insert(0, str(PACKAGES))
    yield
    sys.path.remove(str(PACKAGES))
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_restoration"]:
        del sys.modules[name]


def fill(folder: Path) -> None:
    """Write weights, and `bundle` with engines of ONNX Runtime and compiled ones."""
    import torch
    from safetensors.torch import save_file

    from tilewright.cli.main import main

    random = torch.Generator().manual_seed(0)
    folder.mkdir()
    weights = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    save_file(weights, folder / "toy.safetensors")
    words = (*BUILD, str(folder), "--target", "ort,aoti", "-o", str(folder / "bundle"))
    assert main([*words]) == 0
    assert main(["export", "verify", str(folder / "bundle")]) == 0
