"""The tiny bundles of the diffusion systems, built once, and what their weights are upstream."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file

from support.instantir_files import write_folder
from support.instantir_reference import TINY, make_files
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.systems.flux.sizes import PRESETS


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


@pytest.fixture(scope="session")
def instantir_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random tiny weights as they are published, `make_files(TINY, 0)`; do not change it."""
    return write_folder(tmp_path_factory.mktemp("instantir"), TINY, make_files(TINY, 0))


@pytest.fixture(scope="session")
def instantir_tiny(cache: Path, instantir_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InstantIR's tiny bundle of those files; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "instantir-tiny"
    build(Request("instantir", None, bundle, instantir_files, verify="never", system_options={"resampler_heads": 2}))
    return bundle


@pytest.fixture(scope="session")
def instantir_merged(cache: Path, instantir_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a UNet for each role; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "instantir-merged"
    build(
        Request(
            "instantir",
            None,
            bundle,
            instantir_files,
            verify="never",
            system_options={"lora_mode": "merge", "resampler_heads": 2},
        )
    )
    return bundle
