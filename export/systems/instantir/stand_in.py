"""The published files of SDXL, DINOv2 and InstantIR for stand-ins."""

import json
from collections.abc import Mapping
from typing import Any

from tilewright.export.system import ComponentSpec
from tilewright.export.systems.instantir.keys import keys, origin
from tilewright.export.systems.instantir.sizes import PRESETS
from tilewright.runtime.bundle.program import TensorSpec

__all__ = ["published"]

BASE = "stable-diffusion-xl-base-1.0"
FILES = {
    "unet": f"{BASE}/unet/diffusion_pytorch_model.safetensors",
    "vae": f"{BASE}/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": f"{BASE}/text_encoder/model.safetensors",
    "text_encoder_2": f"{BASE}/text_encoder_2/model.safetensors",
    "dino": "dinov2-large/model.safetensors",
    "adapter": "adapter.safetensors",
    "aggregator": "aggregator.safetensors",
    "lora": "previewer_lora_weights.safetensors",
}
CLIP = {"model_type": "clip_text_model", "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "interpolation_type": "linear",
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
PROCESSOR = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 256},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 0.00392156862745098,
    "do_normalize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_convert_rgb": True,
}
SINGLE = ("dino",)  # published in float32; all else in half precision


def published(sources: Mapping[str, ComponentSpec]) -> dict[str, Any]:
    """File -> the specs of its tensors, or its text."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.tokenizers import stand_in_clip

    files: dict[str, Any] = {file: {} for file in FILES.values()}
    for component, source in sources.items():
        for name, spec in parameter_specs(source).items():
            origin_name = origin(component, name)
            key = keys(component, name)[0]
            assert isinstance(key, str)
            dtype = "float32" if origin_name in SINGLE else "float16"
            files[FILES[origin_name]][_spelled(key) if origin_name == "lora" else key] = TensorSpec(dtype, spec.shape)
    for origin_name, unread in _unread(files[FILES["text_encoder"]]).items():
        files[FILES[origin_name]] |= unread
    words = {"tokenizer": stand_in_clip(49408), "tokenizer_2": stand_in_clip(49408, pads_with_first=True)}
    texts = {f"{BASE}/{folder}/{name}": text for folder, contents in words.items() for name, text in contents.items()}
    return files | texts | {file: json.dumps(values, indent=2) for file, values in configurations().items()}


def _unread(text: Mapping[str, TensorSpec]) -> dict[str, dict[str, TensorSpec]]:
    """Tensors in the files that no network reads: the last layer and norm of CLIP-L, the mask token of DINOv2."""
    full = PRESETS["full"]
    count, width = full.text["num_hidden_layers"], full.text["hidden_size"]
    before, last = f".layers.{count - 2}.", f".layers.{count - 1}."
    layer = {key.replace(before, last): spec for key, spec in text.items() if before in key}
    norm = {f"text_model.final_layer_norm.{name}": TensorSpec("float16", (width,)) for name in ("weight", "bias")}
    mask = {"embeddings.mask_token": TensorSpec("float32", (1, full.dino["hidden_size"]))}
    return {"text_encoder": layer | norm, "dino": mask}


def configurations() -> dict[str, dict[str, Any]]:
    """Configuration file -> its values, without those that equal the default of its class."""
    full = PRESETS["full"]
    return {
        f"{BASE}/unet/config.json": {"_class_name": "UNet2DConditionModel"} | full.unet,
        f"{BASE}/vae/config.json": {"_class_name": "AutoencoderKL", "sample_size": 1024, "force_upcast": True}
        | full.vae,
        f"{BASE}/text_encoder/config.json": {"architectures": ["CLIPTextModel"], "projection_dim": 768}
        | CLIP
        | full.text,
        f"{BASE}/text_encoder_2/config.json": {"architectures": ["CLIPTextModelWithProjection"]} | CLIP | full.text_2,
        f"{BASE}/scheduler/scheduler_config.json": SCHEDULER,
        "dinov2-large/config.json": {"architectures": ["Dinov2Model"], "model_type": "dinov2", "mlp_ratio": 4}
        | full.dino,
        "dinov2-large/preprocessor_config.json": PROCESSOR,
    }


def _spelled(key: str) -> str:
    """The name of a low-rank matrix in the previewer's file, which has two styles of names."""
    module, _, kind = key.rpartition(".")
    if module.endswith(("to_q", "to_k", "to_v", "to_out.0")):
        return f"unet.{module}.lora.{'down' if kind == 'lora_A' else 'up'}.weight"
    return f"unet.{module}.{kind}.weight"
