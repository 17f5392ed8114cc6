"""The tiny bundles of the FLUX systems, built once, and their weights in the upstream classes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file

from tilewright.export.build import build
from tilewright.export.request import Request
from tilewright.export.systems.flux_sizes import PRESETS


@pytest.fixture(scope="session")
def in_token_tiny(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In-Token's tiny bundle with random weights; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "in-token-tiny"
    build(Request("in-token", "tiny", bundle, seed=0))
    return bundle


@pytest.fixture(scope="session")
def vicr_tiny(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """VICR's tiny bundle with random weights; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "vicr-tiny"
    build(Request("vicr", "tiny", bundle, seed=0))
    return bundle


@pytest.fixture(scope="session")
def upstream() -> Callable[[Path], tuple[Any, Any]]:
    """diffusers' transformer and VAE with a bundle's packed weights, whose names must be theirs, all of them."""

    def load(bundle: Path) -> tuple[Any, Any]:
        sizes = PRESETS["tiny"]
        transformer, vae = FluxTransformer2DModel(**sizes.transformer), AutoencoderKL(**sizes.vae)
        for network, name in ((transformer, "transformer"), (vae, "vae")):
            network.load_state_dict(load_file(bundle / "weights" / name / f"{name}.safetensors"), strict=True)
            network.eval().requires_grad_(False)
        return transformer, vae

    return load
