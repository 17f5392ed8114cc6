"""The tiny bundles of the diffusion systems, built once, and what their weights are upstream."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.tokenizers import put, stand_in_clip


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
def instantir_reference() -> Any:
    """The module instantir_reference, which lies in no package."""
    name = "instantir_reference"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture(scope="session")
def instantir_files(instantir_reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with random tiny weights as they are published, `make_files(TINY, 0)`; do not change it."""
    folder, files = tmp_path_factory.mktemp("instantir"), instantir_reference.make_files(instantir_reference.TINY, 0)
    for origin, file in {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
        "text_encoder": "text_encoder/model.safetensors",
        "text_encoder_2": "text_encoder_2/model.safetensors",
        "dino": "dinov2-large/model.safetensors",
    }.items():
        (folder / file).parent.mkdir()
        save_file(files[origin], folder / file)
    for origin, file in (("adapter", "adapter.pt"), ("aggregator", "aggregator.pt")):
        torch.save(files[origin], folder / file)
    torch.save(files["previewer"], folder / "previewer_lora_weights.bin")
    put(folder / "tokenizer", stand_in_clip(64))
    put(folder / "tokenizer_2", stand_in_clip(64, pads_with_first=True))
    return folder


@pytest.fixture(scope="session")
def instantir_tiny(cache: Path, instantir_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InstantIR's tiny bundle of those files; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "instantir-tiny"
    build(Request("instantir", "tiny", bundle, instantir_files, verify="never"))
    return bundle


@pytest.fixture(scope="session")
def instantir_merged(cache: Path, instantir_files: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a UNet for each role; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "instantir-merged"
    build(Request("instantir", "tiny", bundle, instantir_files, verify="never", given={"lora_mode": "merge"}))
    return bundle
