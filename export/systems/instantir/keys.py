"""InstantIR's key names: a parameter of a graph to what the released files call it.

The release counts cross-attentions, in the order down, up, middle, by odd numbers; our parameters carry them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tilewright.export.system import LoraFile, Origin, Rows, Tensors
from tilewright.export.weights.lora import as_parameters

__all__ = ["LORA", "ORIGINS", "ignored", "keys", "lora_targets", "named", "origin"]

LORA = LoraFile("lora", prefixes=("unet.",), default_alpha=1.0)  # the previewer's file says nothing of alpha
RESAMPLER = "encoder_hid_proj.image_projection_layers.0."
PROCESSOR = re.compile(r"\.processor_(\d+)\.")
DINO = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
GATED = ("gate_proj", "up_proj")  # which published files of the largest DINOv2 keep as one tensor
OF_COMPONENT = {
    "text": "text_encoder",
    "words": "unet",
    "unet": "unet",
    "base": "unet",
    "preview": "unet",
    "look": "adapter",
    "look_base": "adapter",
    "look_preview": "adapter",
    "see": "dino",
    "nothing": "dino",
    "positions": "dino",
    "aggregate": "aggregator",
    "encode": "vae",
    "decode": "vae",
}  # gates and step have no weights
WITH_LORA = ("unet", "preview", "look", "look_preview")


def named(adapter: Tensors) -> Tensors:
    """An adapter's tensors under the names of its nested layout."""
    layouts = {"image_proj_model.": "image_proj.", "adapter_modules.": "ip_adapter."}
    tensors = {}
    for key, reference in adapter.tensors.items():
        prefix = next((p for p in layouts if key.startswith(p)), "")
        tensors[layouts.get(prefix, "") + key.removeprefix(prefix)] = reference
    return replace(adapter, tensors=tensors)


ORIGINS = {
    "unet": Origin("weights", ("unet",), "SDXL's UNet"),
    "vae": Origin("weights", ("vae",), "SDXL's VAE"),
    "text_encoder": Origin("weights", ("text_encoder",), "SDXL's CLIP-L text encoder", needed=False),
    "text_encoder_2": Origin("weights", ("text_encoder_2",), "SDXL's bigG text encoder", needed=False),
    "dino": Origin("dino", (".",), "DINOv2-large"),
    "adapter": Origin("adapter", (".",), "InstantIR's adapter", read=named),
    "aggregator": Origin("aggregator", (".",), "InstantIR's aggregator"),
    "lora": Origin(
        "previewer",
        (".",),
        "InstantIR's previewer LoRA",
        read=partial(as_parameters, prefixes=LORA.prefixes, default_alpha=LORA.default_alpha),
    ),
}


def origin(component: str, parameter: str) -> str:
    """Low-rank pairs come from the previewer, image attention from the adapter, all else from the base."""
    if ".lora_" in parameter and component in WITH_LORA:
        return "lora"
    if PROCESSOR.search(parameter):
        return "adapter"
    return "text_encoder_2" if parameter.startswith("text_2.") else OF_COMPONENT[component]


def keys(component: str, parameter: str) -> tuple[str | Rows, ...]:
    """A parameter as its file names it, best first."""
    name = parameter.removeprefix("unet.")
    if ".lora_" in parameter:
        return (PROCESSOR.sub(".", name.replace("resampler.", RESAMPLER, 1)),)
    if number := PROCESSOR.search(name):
        return (f"ip_adapter.{number[1]}.{name[number.end() :]}",)
    if name.startswith("resampler."):
        return (name.replace("resampler.", "image_proj.", 1),)
    if component == "text":
        tower, _, inner = name.partition(".")
        return (inner,) if tower == "text_2" else (f"text_model.{inner}", inner)
    if OF_COMPONENT[component] == "dino":
        return _dino_keys(name.removeprefix("model."))
    if OF_COMPONENT[component] == "vae":
        return (name, _deprecated(name))
    return (name,)


def _dino_keys(name: str) -> tuple[str | Rows, ...]:
    """As published and as transformers 5 spells them."""
    if name == "position_embeddings":
        return ("embeddings.position_embeddings",)
    public = name.replace(".attention.o_proj.", ".attention.output.dense.")
    for theirs, ours in DINO.items():
        public = public.replace(f".attention.{ours}.", f".attention.attention.{theirs}.")
    for half, ours in enumerate(GATED):
        if f".mlp.{ours}." in name:
            return (Rows(name.replace(ours, "weights_in"), half, half + 1, len(GATED)), name)
    return (public.replace(".mlp.down_proj.", ".mlp.weights_out."), name)


def _deprecated(name: str) -> str:
    """The VAE's attention as diffusers called it before 0.17."""
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
    return name


def ignored(origin: str, key: str) -> bool:
    """Counters, other towers, and what lies behind the last hidden states that are read."""
    if key.endswith("position_ids"):
        return True
    if origin == "text_encoder":  # its last layer, whichever number that has
        beside = "text_projection.", "vision_model.", "visual_projection.", "logit_"
        return key.startswith(beside) or bool(
            re.match(r"(text_model\.)?(encoder\.layers\.\d+|final_layer_norm)\.", key)
        )
    return origin == "dino" and (key.endswith("mask_token") or key.startswith("classifier."))


def lora_targets(config: Mapping[str, Any], depth: int) -> list[str]:
    """Every module that the released previewer adapts, by its path in the file."""
    widths, layers = config["block_out_channels"], int(config["layers_per_block"])
    transformers = config["transformer_layers_per_block"]
    downs = [(f"down_blocks.{i}", w, layers, t) for i, (w, t) in enumerate(zip(widths, transformers, strict=True))]
    ups = [(f"up_blocks.{i}", w, layers + 1, t) for i, (w, t) in enumerate(zip(widths, transformers, strict=True))]
    targets = []
    for i, (path, width, count, length) in enumerate(downs):
        attends = config["down_block_types"][i].startswith("CrossAttn")
        came = [widths[max(0, i - 1)], *[width] * (count - 1)]
        targets += _block_targets(path, [c != width for c in came], length if attends else 0, count)
        targets += [f"{path}.downsamplers.0.conv"] if i + 1 < len(widths) else []
    for i, (path, _, count, _) in enumerate(ups):
        attends = config["up_block_types"][i].startswith("CrossAttn")
        length = transformers[len(widths) - 1 - i]
        targets += _block_targets(path, [True] * count, length if attends else 0, count)
        targets += [f"{path}.upsamplers.0.conv"] if i + 1 < len(widths) else []
    targets += _block_targets("mid_block", [False] * 2, transformers[-1], 1)
    perceivers = [f"layers.{i}.0.{name}" for i in range(depth) for name in ("to_q", "to_kv", "to_out")]
    return targets + [RESAMPLER + name for name in (*perceivers, "proj_in", "proj_out")]


def _block_targets(path: str, shortcuts: list[bool], length: int, attentions: int) -> list[str]:
    resnet = ("conv1", "conv2", "time_emb_proj")
    targets = [f"{path}.resnets.{i}.{name}" for i in range(len(shortcuts)) for name in resnet]
    targets += [f"{path}.resnets.{i}.conv_shortcut" for i, there in enumerate(shortcuts) if there]
    inner = [f"attn{a}.{name}" for a in (1, 2) for name in ("to_q", "to_out.0")] + ["attn1.to_k", "attn1.to_v"]
    inner += [f"attn2.{name}" for name in ("to_k_ip", "to_v_ip", "ln_k_ip.linear", "ln_v_ip.linear")]
    inner += ["ff.net.0.proj", "ff.net.2"]
    for i in range(attentions if length else 0):
        targets += [f"{path}.attentions.{i}.{name}" for name in ("proj_in", "proj_out")]
        blocks = (f"{path}.attentions.{i}.transformer_blocks.{j}" for j in range(length))
        targets += [f"{block}.{name}" for block in blocks for name in inner]
    return targets
