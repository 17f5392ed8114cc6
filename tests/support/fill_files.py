"""Folders as FLUX.1-Fill, Redux and CLIP are published, of sizes that no preset has, and the networks in them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
    T5Config,
    T5EncoderModel,
)

from tilewright.export.tokenizers import put, stand_in_clip, stand_in_t5

__all__ = ["SIZES", "Published", "publish"]

MEAN, DEVIATION = [0.4, 0.5, 0.55], [0.3, 0.5, 0.8]
SIZES: dict[str, dict[str, Any]] = {
    "transformer": {
        "in_channels": 2 * 12 + 64,
        "out_channels": 12,
        "num_layers": 1,
        "num_single_layers": 2,
        "attention_head_dim": 12,
        "num_attention_heads": 3,
        "joint_attention_dim": 20,
        "pooled_projection_dim": 24,
        "guidance_embeds": True,
        "axes_dims_rope": (2, 4, 6),
    },
    "vae": {
        "block_out_channels": (6, 8, 12),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 3,
        "norm_num_groups": 2,
        "act_fn": "gelu",
        "scaling_factor": 0.7,
        "shift_factor": -0.2,
        "sample_size": 48,
    },
    "scheduler": {
        "base_shift": 0.9,
        "max_shift": 1.4,
        "base_image_seq_len": 4,
        "max_image_seq_len": 144,
    },
    "t5": {
        "vocab_size": 96,
        "d_model": 20,
        "d_kv": 6,
        "d_ff": 28,
        "num_layers": 1,
        "num_heads": 5,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 20,
        "layer_norm_epsilon": 1e-3,
        "feed_forward_proj": "relu",
    },
    "clip_text": {
        "vocab_size": 80,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 3,
        "max_position_embeddings": 20,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    },
    "siglip": {
        "hidden_size": 30,
        "intermediate_size": 20,
        "num_hidden_layers": 1,
        "num_attention_heads": 5,
        "image_size": 29,
        "patch_size": 9,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-3,
    },
    "clip_vision": {
        "hidden_size": 36,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 26,
        "patch_size": 8,
        "projection_dim": 14,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
    },
}
WORDS, CLIP_WORDS, BRIDGE, SHORT = 40, 18, 10, 31


@dataclass
class Published:
    """A folder of everything, and the networks in it."""

    folder: Path
    transformer: Any
    vae: Any
    siglip: Any
    redux: Any
    t5: Any
    clip_text: Any
    clip_vision: Any
    bridge: dict[str, Tensor]


def _filled(network: Any, seed: int) -> Any:
    """Random weights that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            near = 0.0 if parameter.ndim > 1 or name.endswith("bias") else 1.0
            parameter.copy_(noise * fan_in**-0.5 if parameter.ndim > 1 else near + 0.1 * noise)
    return network.eval().requires_grad_(False)


def publish(folder: Path, **changes: dict[str, Any]) -> Published:
    """Write the folders; `changes` are of SIZES."""
    sizes = {name: of | changes.get(name, {}) for name, of in SIZES.items()}
    fill, redux, clip = (folder / name for name in ("FLUX.1-Fill-dev", "FLUX.1-Redux-dev", "clip-vit-large-patch14"))
    seed = iter(range(100))

    def saved(network: nn.Module, place: Path) -> Any:
        _filled(network, next(seed)).save_pretrained(place)
        return network

    transformer = saved(FluxTransformer2DModel(**sizes["transformer"]), fill / "transformer")
    vae = saved(AutoencoderKL(**sizes["vae"]), fill / "vae")
    shift = {"shift": 3.0, "use_dynamic_shifting": True}
    FlowMatchEulerDiscreteScheduler(**shift, **sizes["scheduler"]).save_config(fill / "scheduler")
    ends = {"bos_token_id": 0, "eos_token_id": sizes["clip_text"]["vocab_size"] - 1}
    clip_text = saved(CLIPTextModel(CLIPTextConfig(**sizes["clip_text"], **ends)), fill / "text_encoder")
    t5 = saved(T5EncoderModel(T5Config(**sizes["t5"])), fill / "text_encoder_2")
    clip_files = stand_in_clip(sizes["clip_text"]["vocab_size"])
    said = json.loads(clip_files["tokenizer_config.json"]) | {"model_max_length": CLIP_WORDS}
    put(fill / "tokenizer", clip_files | {"tokenizer_config.json": json.dumps(said)})
    limit = json.dumps({"model_max_length": WORDS})
    put(fill / "tokenizer_2", {"tokenizer.json": stand_in_t5(96), "tokenizer_config.json": limit})

    siglip = saved(SiglipVisionModel(SiglipVisionConfig(**sizes["siglip"])), redux / "image_encoder")
    embedder = ReduxImageEncoder(sizes["siglip"]["hidden_size"], sizes["transformer"]["joint_attention_dim"])
    saved(embedder, redux / "image_embedder")
    numbers, side = {"image_mean": MEAN, "image_std": DEVIATION}, sizes["siglip"]["image_size"]
    processor = SiglipImageProcessor(size={"height": side, "width": side}, **numbers)
    processor.save_pretrained(redux / "feature_extractor")

    clip_vision = saved(CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes["clip_vision"])), clip)
    side = sizes["clip_vision"]["image_size"]
    crop = {"height": side, "width": side}
    CLIPImageProcessor(size={"shortest_edge": SHORT}, crop_size=crop, **numbers).save_pretrained(clip)

    bridge = _bridge(sizes["clip_vision"]["projection_dim"], sizes["transformer"]["pooled_projection_dim"])
    save_file(bridge | _pair(sizes["transformer"]), folder / "vicr.safetensors")
    return Published(folder, transformer, vae, siglip, embedder, t5, clip_text, clip_vision, bridge)


def _bridge(width_in: int, width_out: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(77)
    shapes = {
        "norm.weight": (width_in,),
        "norm.bias": (width_in,),
        "fc1.weight": (BRIDGE, width_in),
        "fc1.bias": (BRIDGE,),
        "fc2.weight": (width_out, BRIDGE),
        "fc2.bias": (width_out,),
        "scale": (),
    }
    return {f"vcb.{name}": torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def _pair(sizes: dict[str, Any]) -> dict[str, Tensor]:
    """A LoRA that changes nothing yet: its second halves are zeros."""
    width = sizes["attention_head_dim"] * sizes["num_attention_heads"]
    module = "transformer.single_transformer_blocks.0.attn.to_q"
    return {f"{module}.lora_A.weight": torch.ones(2, width), f"{module}.lora_B.weight": torch.zeros(width, 2)}
