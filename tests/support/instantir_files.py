"""InstantIR's files as a user has them: weights under the published names, configurations of the libraries."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from transformers import BitImageProcessor, CLIPTextConfig, Dinov2Config

from support.instantir_reference import Sizes
from tilewright.export.tokenizers import put, stand_in_clip

SDXL = "stable-diffusion-xl-base-1.0"
FILES = {
    "unet": f"{SDXL}/unet/diffusion_pytorch_model.safetensors",
    "vae": f"{SDXL}/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": f"{SDXL}/text_encoder/model.safetensors",
    "text_encoder_2": f"{SDXL}/text_encoder_2/model.safetensors",
    "dino": "dinov2-large/model.safetensors",
    "adapter": "adapter.pt",
    "aggregator": "aggregator.pt",
    "previewer": "previewer_lora_weights.bin",
}


def write_folder(root: Path, sizes: Sizes, files: dict[str, dict[str, Any]]) -> Path:
    """The folder, with everything that a build reads."""
    for name, file in FILES.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (save_file if file.endswith(".safetensors") else torch.save)(files[name], root / file)
    write_configurations(root, sizes)
    put(root / SDXL / "tokenizer", stand_in_clip(sizes.text["vocab_size"]))
    put(root / SDXL / "tokenizer_2", stand_in_clip(sizes.text_2["vocab_size"], pads_with_first=True))
    return root


def write_configurations(root: Path, sizes: Sizes) -> None:
    """What the libraries' own classes save of these sizes."""
    with torch.device("meta"):
        UNet2DConditionModel(**sizes.unet).save_config(root / SDXL / "unet")
        AutoencoderKL(**sizes.vae).save_config(root / SDXL / "vae")
    for name, architecture, tower in (
        ("text_encoder", "CLIPTextModel", sizes.text),
        ("text_encoder_2", "CLIPTextModelWithProjection", sizes.text_2),
    ):
        CLIPTextConfig(architectures=[architecture], **tower).save_pretrained(root / SDXL / name)
    Dinov2Config(architectures=["Dinov2Model"], **sizes.dino).save_pretrained(root / "dinov2-large")
    BitImageProcessor(
        size={"shortest_edge": sizes.dino_resize},
        crop_size={"height": sizes.dino_side, "width": sizes.dino_side},
        image_mean=list(sizes.mean),
        image_std=list(sizes.deviation),
    ).save_pretrained(root / "dinov2-large")
    DDIMScheduler(**sizes.schedule).save_config(root / SDXL / "scheduler")
