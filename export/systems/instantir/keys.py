"""The names of InstantIR's tensors in the released files, for each parameter of a graph.

The release numbers cross-attentions with odd numbers, in the order down, up, middle. Our parameters contain them.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from tilewright.export.system import LoraFile, Origin, Rows, Tensors
from tilewright.export.weights.lora import as_parameters

__all__ = ["LORA", "ORIGINS", "ignored", "keys", "lora_targets", "named", "origin"]

LORA = LoraFile("lora", prefixes=("unet.",), default_alpha=1.0)  # the previewer's file has no alpha
RESAMPLER = "encoder_hid_proj.image_projection_layers.0."
PROCESSOR = re.compile(r"\.processor_(\d+)\.")
DINO = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
GATED = ("gate_proj", "up_proj")  # published files of the largest DINOv2 fuse the two into one tensor
ORIGIN_OF_COMPONENT = {
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
    """An adapter's tensors under the names of its nested layout, whichever of its two layouts the file has."""
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
    "adapter": Origin("adapter", (".",), "InstantIR's adapter", rename=named),
    "aggregator": Origin("aggregator", (".",), "InstantIR's aggregator"),
    "lora": Origin(
        "previewer",
        (".",),
        "InstantIR's previewer LoRA",
        rename=partial(as_parameters, prefixes=LORA.prefixes, default_alpha=LORA.default_alpha),
    ),
}


def origin(component: str, parameter: str) -> str:
    """The origin of a parameter: previewer for low-rank pairs, adapter for image attention, else its component's."""
    if ".lora_" in parameter and component in WITH_LORA:
        return "lora"
    if PROCESSOR.search(parameter):
        return "adapter"
    return "text_encoder_2" if parameter.startswith("text_2.") else ORIGIN_OF_COMPONENT[component]


def keys(component: str, parameter: str) -> tuple[str | Rows, ...]:
    """The names of a parameter in files, best first."""
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
    if ORIGIN_OF_COMPONENT[component] == "dino":
        return _dino_keys(name.removeprefix("model."))
    if ORIGIN_OF_COMPONENT[component] == "vae":
        return (name, _deprecated(name))
    return (name,)


def _dino_keys(name: str) -> tuple[str | Rows, ...]:
    """The names of DINOv2's parameters as published, then those of transformers 5."""
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
    """The names of the VAE's attention in diffusers before 0.17."""
    for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
        name = name.replace(f"attentions.0.{ours}.", f"attentions.0.{theirs}.")
    return name


def ignored(origin: str, key: str) -> bool:
    """Whether no network reads a key: counters, other towers, and layers behind the last hidden state that is read."""
    if key.endswith("position_ids"):
        return True
    if origin == "text_encoder":  # its last layer is not read, and may have any number
        beside = "text_projection.", "vision_model.", "visual_projection.", "logit_"
        return key.startswith(beside) or bool(
            re.match(r"(text_model\.)?(encoder\.layers\.\d+|final_layer_norm)\.", key)
        )
    return origin == "dino" and (key.endswith("mask_token") or key.startswith("classifier."))


def lora_targets(config: Mapping[str, Any], depth: int) -> list[str]:
    """The path in the file of every module that the released previewer adapts."""
    widths, layers = config["block_out_channels"], int(config["layers_per_block"])
    transformers = config["transformer_layers_per_block"]
    downs = [(f"down_blocks.{i}", w, layers, t) for i, (w, t) in enumerate(zip(widths, transformers, strict=True))]
    ups = [(f"up_blocks.{i}", w, layers + 1, t) for i, (w, t) in enumerate(zip(widths, transformers, strict=True))]
    targets = []
    for i, (path, width, count, length) in enumerate(downs):
        attends = config["down_block_types"][i].startswith("CrossAttn")
        widths_in = [widths[max(0, i - 1)], *[width] * (count - 1)]
        targets += _block_targets(path, [c != width for c in widths_in], length if attends else 0, count)
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
    targets += [f"{path}.resnets.{i}.conv_shortcut" for i, has_shortcut in enumerate(shortcuts) if has_shortcut]
    inner = [f"attn{a}.{name}" for a in (1, 2) for name in ("to_q", "to_out.0")] + ["attn1.to_k", "attn1.to_v"]
    inner += [f"attn2.{name}" for name in ("to_k_ip", "to_v_ip", "ln_k_ip.linear", "ln_v_ip.linear")]
    inner += ["ff.net.0.proj", "ff.net.2"]
    for i in range(attentions if length else 0):
        targets += [f"{path}.attentions.{i}.{name}" for name in ("proj_in", "proj_out")]
        blocks = (f"{path}.attentions.{i}.transformer_blocks.{j}" for j in range(length))
        targets += [f"{block}.{name}" for block in blocks for name in inner]
    return targets
