"""The published files of FLUX for stand-ins: configuration files, and the name, shape and type of every tensor."""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from tilewright.export.networks import configs
from tilewright.export.systems.flux.fill import text_encoders as text_components
from tilewright.export.systems.flux.keys import keys
from tilewright.export.systems.flux.sizes import CLIP_TEXT, CLIP_VOCABULARY, PRESETS
from tilewright.export.weights.config import Config
from tilewright.runtime.bundle.program import TensorSpec

__all__ = ["bfloat16", "config", "lora_pairs", "scheduler", "sharded", "text_encoders", "transformer", "vae"]

SHARD_BYTES = 9_985_000_000  # the most that a published shard holds


def config(form: Config, values: Mapping[str, Any]) -> str:
    """The text of a configuration file with these values, and with those that its class must have."""
    first = form.classes[0]
    of_transformers = any(name.islower() for name in form.classes)  # only that library also names types of models
    key = "image_processor_type" if form.file == "preprocessor_config.json" else "_class_name"
    name: dict[str, Any] = {"architectures": [first]} if of_transformers else {key: first}
    return json.dumps(name | {**form.must, **values}, indent=2) + "\n"


def scheduler() -> dict[str, Any]:
    """The published configuration file of the scheduler."""
    return {f"scheduler/{configs.FLOW.file}": config(configs.FLOW, {"shift": 3.0, **PRESETS["full"].schedule})}


def transformer() -> dict[str, Any]:
    """The published folder of the transformer: configuration, three shards and their index."""
    from diffusers import FluxTransformer2DModel

    specs = _published(FluxTransformer2DModel, PRESETS["full"].transformer)
    shards: list[dict[str, TensorSpec]] = [{}]
    room = SHARD_BYTES
    for name, spec in specs.items():
        if (size := 2 * int(np.prod([int(d) for d in spec.shape]))) > room:
            shards.append({})
            room = SHARD_BYTES
        shards[-1][name] = spec
        room -= size
    config_file = {"transformer/config.json": config(configs.FLUX, PRESETS["full"].transformer)}
    return config_file | sharded("transformer", "diffusion_pytorch_model", shards)


def sharded(folder: str, stem: str, shards: list[dict[str, TensorSpec]]) -> dict[str, Any]:
    """The shards of a model, and the index that names the shard of each tensor."""
    names = [f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    index = {
        "metadata": {},
        "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
    }
    files: dict[str, Any] = {f"{folder}/{name}": shard for name, shard in zip(names, shards, strict=True)}
    return files | {f"{folder}/{stem}.safetensors.index.json": json.dumps(index, indent=1)}


def vae() -> dict[str, Any]:
    """The published folder of the VAE."""
    from diffusers import AutoencoderKL

    sizes = PRESETS["full"]
    return {
        "vae/config.json": config(configs.VAE, {**sizes.vae, "sample_size": sizes.tile_px}),
        "vae/diffusion_pytorch_model.safetensors": _published(AutoencoderKL, sizes.vae),
    }


def text_encoders() -> dict[str, Any]:
    """The published folders of both text encoders and their tokenizers."""
    from tilewright.export.graph.trace import parameter_specs
    from tilewright.export.tokenizers import stand_in_clip, stand_in_t5

    sizes = PRESETS["full"]
    tensors = {
        component: {str(keys(component, name)[0]): bfloat16(spec) for name, spec in parameter_specs(network).items()}
        for component, network in text_components(sizes).items()
    }
    half = len(tensors["t5"]) // 2
    shards = [dict(list(tensors["t5"].items())[:half]), dict(list(tensors["t5"].items())[half:])]
    files = sharded("text_encoder_2", "model", shards) | {"text_encoder/model.safetensors": tensors["clip"]}
    files |= {f"tokenizer/{name}": text for name, text in stand_in_clip(CLIP_VOCABULARY).items()}
    return files | {
        "text_encoder/config.json": config(CLIP_TEXT, {**sizes.clip_text, "eos_token_id": 2}),
        "text_encoder_2/config.json": config(configs.T5, sizes.t5),
        "tokenizer_2/tokenizer.json": stand_in_t5(32128),
        "tokenizer_2/tokenizer_config.json": json.dumps({"model_max_length": sizes.words}),
    }


def lora_pairs(targets: str, rank: int) -> dict[str, TensorSpec]:
    """The tensors of a LoRA for every linear layer of the transformer whose name matches `targets`."""
    from diffusers import FluxTransformer2DModel

    tensors = {}
    for name, spec in _published(FluxTransformer2DModel, PRESETS["full"].transformer).items():
        module = name.removesuffix(".weight")
        if module != name and len(spec.shape) == 2 and re.fullmatch(targets, module):
            tensors[f"transformer.{module}.lora_A.weight"] = TensorSpec("bfloat16", (rank, spec.shape[1]))
            tensors[f"transformer.{module}.lora_B.weight"] = TensorSpec("bfloat16", (spec.shape[0], rank))
    return tensors


def _published(network: Any, sizes: Mapping[str, Any]) -> dict[str, TensorSpec]:
    import torch

    with torch.device("meta"):
        state = network(**sizes).state_dict()
    return {name: TensorSpec("bfloat16", tuple(tensor.shape)) for name, tensor in state.items()}


def bfloat16(spec: TensorSpec) -> TensorSpec:
    """The same shape in bfloat16, the type in which these weights are published."""
    return TensorSpec("bfloat16", spec.shape)
