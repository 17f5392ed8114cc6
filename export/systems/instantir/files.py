"""The files in which SDXL, DINOv2 and InstantIR are published: what stand-ins are made of."""

from collections.abc import Mapping
from typing import Any

from tilewright.export.system import ComponentSpec
from tilewright.export.systems.instantir.keys import keys, origin
from tilewright.runtime.program import TensorSpec

__all__ = ["published"]

FILES = {
    "unet": "stable-diffusion-xl-base-1.0/unet/diffusion_pytorch_model.safetensors",
    "vae": "stable-diffusion-xl-base-1.0/vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "stable-diffusion-xl-base-1.0/text_encoder/model.safetensors",
    "text_encoder_2": "stable-diffusion-xl-base-1.0/text_encoder_2/model.safetensors",
    "dino": "dinov2-large/model.safetensors",
    "adapter": "adapter.safetensors",
    "aggregator": "aggregator.safetensors",
    "lora": "previewer_lora_weights.safetensors",
}
SINGLE = ("dino",)  # published in float32; all else in half precision


def published(sources: Mapping[str, ComponentSpec]) -> dict[str, Any]:
    """File -> its tensors, or its text."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.tokenizers import stand_in_clip

    files: dict[str, Any] = {file: {} for file in FILES.values()}
    for component, source in sources.items():
        for name, spec in parameter_specs(source).items():
            of = origin(component, name)
            key = keys(component, name)[0]
            dtype = "float32" if of in SINGLE else "float16"
            files[FILES[of]][_spelled(key) if of == "lora" else key] = TensorSpec(dtype, spec.shape)
    base = "stable-diffusion-xl-base-1.0"
    texts = {"tokenizer": stand_in_clip(49408), "tokenizer_2": stand_in_clip(49408, pads_with_first=True)}
    return files | {f"{base}/{folder}/{name}": text for folder, held in texts.items() for name, text in held.items()}


def _spelled(key: str) -> str:
    """A low-rank matrix as the previewer's file spells it, which is not one way."""
    module, _, kind = key.rpartition(".")
    if module.endswith(("to_q", "to_k", "to_v", "to_out.0")):
        return f"unet.{module}.lora.{'down' if kind == 'lora_A' else 'up'}.weight"
    return f"unet.{module}.{kind}.weight"
