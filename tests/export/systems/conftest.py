"""The tiny bundles of the diffusion systems, built once, and what their weights are upstream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file

from support.instantir_files import write_folder
from support.instantir_reference import TINY, make_files
from support.shared import Shared
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.systems.flux.sizes import PRESETS


@pytest.fixture(scope="session")
def vicr_tiny(shared: Shared) -> Path:
    """VICR's tiny bundle with random weights; do not change it."""
    return shared("vicr-tiny", lambda bundle: build(Request("vicr", "tiny", bundle, seed=0)))


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


@pytest.fixture(scope="session")
def instantir_files(shared: Shared) -> Path:
    """A folder with random tiny weights as they are published, `make_files(TINY, 0)`; do not change it."""
    return shared("instantir", lambda folder: write_folder(folder, TINY, make_files(TINY, 0)))


def _instantir(files: Path, **asked: Any) -> Callable[[Path], object]:
    asked["resampler_heads"] = 2
    return lambda bundle: build(Request("instantir", None, bundle, files, verify="never", system_options=asked))


@pytest.fixture(scope="session")
def instantir_tiny(instantir_files: Path, shared: Shared) -> Path:
    """InstantIR's tiny bundle of those files; do not change it."""
    return shared("instantir-tiny", _instantir(instantir_files))


@pytest.fixture(scope="session")
def instantir_merged(instantir_files: Path, shared: Shared) -> Path:
    """The same with a UNet for each role; do not change it."""
    return shared("instantir-merged", _instantir(instantir_files, lora_mode="merge"))
