"""The names of FLUX's tensors in published files, for each parameter of a graph.

Our parameters have the names of diffusers and transformers. The single files of the models' authors use other names
and fuse some matrices: a parameter is then some rows of a fused tensor.
"""

import re
from dataclasses import replace

from tilewright.export.system import Rows, Tensors

__all__ = ["ORIGIN_OF_COMPONENT", "ignored", "keys", "named_by_diffusers", "origin"]

ORIGIN_OF_COMPONENT = {
    "step": "transformer",
    "modulate": "transformer",
    "encode": "vae",
    "decode": "vae",
    "t5": "text_encoder_2",
    "clip": "text_encoder",
    "see": "image_encoder",
    "redux": "image_embedder",
    "bridge": "lora",
}


def origin(component: str, parameter: str) -> str:
    """The origin of a parameter: the LoRA for low-rank pairs, else the folder of its component."""
    return "lora" if ".lora_" in parameter else ORIGIN_OF_COMPONENT[component]


def keys(component: str, parameter: str) -> tuple[str | Rows, ...]:
    """The names of a parameter in files: of diffusers or transformers, then of the models' authors."""
    if component in ("step", "modulate"):
        return _transformer_keys(parameter.removeprefix("transformer."))
    if component == "bridge":
        return (f"vcb.{parameter}",)
    name = parameter.removeprefix("model.")
    prefix = {"clip": "text_model.", "see": "vision_model."}.get(component)
    towers = ("vision_model.", "visual_projection.")  # CLIP with a projection has its published names already
    return (prefix + name, name) if prefix and not name.startswith(towers) else (name,)


def _transformer_keys(name: str) -> tuple[str | Rows, ...]:
    module, _, kind = name.rpartition(".")
    path = module.removesuffix(".scale").removesuffix(".shift")
    if path != "norm_out.linear" or module == path:
        return (name,) if kind.startswith("lora_") else (name, *_authors_key(module, kind))
    half = int(module.endswith("shift"))
    if kind == "lora_A":
        return (f"{path}.lora_A",)
    authors = Rows(f"final_layer.adaLN_modulation.1.{kind}", 1 - half, 2 - half, 2)  # shift is first
    return (Rows(f"{path}.{kind}", half, half + 1, 2), *(() if kind == "lora_B" else (authors,)))


AUTHORS = {
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "context_embedder": "txt_in",
    "x_embedder": "img_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
AUTHORS_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
AUTHORS_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
THIRDS = {"to_q": "img", "to_k": "img", "to_v": "img", "add_q_proj": "txt", "add_k_proj": "txt", "add_v_proj": "txt"}
SEVENTHS = {"attn.to_q": (0, 1), "attn.to_k": (1, 2), "attn.to_v": (2, 3), "proj_mlp": (3, 7)}  # q, k, v, and 4 of mlp


def _authors_key(module: str, kind: str) -> tuple[str | Rows, ...]:
    """The name in flux1-fill-dev.safetensors. There q, k and v are one tensor, in a single block the mlp with them."""
    if module in AUTHORS:
        return (f"{AUTHORS[module]}.{kind}",)
    match = re.fullmatch(r"(single_)?transformer_blocks\.(\d+)\.(.+)", module)
    if match is None:
        return ()
    single, number, inner = match.groups()
    block = f"{'single' if single else 'double'}_blocks.{number}"
    if single and inner in SEVENTHS:
        return (Rows(f"{block}.linear1.{kind}", *SEVENTHS[inner], 7),)
    projection = inner.removeprefix("attn.")
    if not single and projection in THIRDS:
        third = list(THIRDS).index(projection) % 3
        return (Rows(f"{block}.{THIRDS[projection]}_attn.qkv.{kind}", third, third + 1, 3),)
    named = (AUTHORS_SINGLE if single else AUTHORS_DOUBLE).get(inner)
    is_norm = "attn.norm_" in inner
    return () if named is None else (f"{block}.{named}.{'scale' if is_norm else kind}",)


AUTHORS_VAE = (
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1\.norm", "mid_block.attentions.0.group_norm"),
    (r"mid\.attn_1\.([qkv])", r"mid_block.attentions.0.to_\1"),
    (r"mid\.attn_1\.proj_out", "mid_block.attentions.0.to_out.0"),
    (r"(down|up)\.(\d+)\.block\.(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"(down|up)\.(\d+)\.(down|up)sample\.conv", r"\1_blocks.\2.\3samplers.0.conv"),
    ("nin_shortcut", "conv_shortcut"),
    (r"(en|de)coder\.norm_out", r"\1coder.conv_norm_out"),
)
AUTHORS_UP = re.compile(r"decoder\.up\.(\d+)\.")


def named_by_diffusers(vae: Tensors) -> Tensors:
    """The tensors of ae.safetensors under the names of diffusers.

    The authors count the decoder's blocks from the picture inwards, so the names depend on how many blocks there are.
    """
    blocks = [int(match[1]) for match in map(AUTHORS_UP.match, vae.tensors) if match]
    if not blocks:
        return vae
    return replace(vae, tensors={_by_diffusers(key, max(blocks)): r for key, r in vae.tensors.items()})


def _by_diffusers(key: str, last: int) -> str:
    key = AUTHORS_UP.sub(lambda match: f"decoder.up.{last - int(match[1])}.", key)
    for pattern, name in AUTHORS_VAE:
        key = re.sub(pattern, name, key)
    return key


def ignored(origin: str, key: str) -> bool:
    """Whether no network reads a key: published files also hold other towers, heads and counters."""
    if key.endswith("position_ids"):
        return True
    if origin == "text_encoder":
        return key.startswith(("vision_model.", "visual_projection.", "text_projection.", "logit_"))
    if origin == "text_encoder_2":
        return key.startswith(("decoder.", "lm_head.")) or key == "encoder.embed_tokens.weight"
    if origin == "image_encoder":  # SigLIP's or CLIP's image tower
        return key.startswith(("text_model.", "text_projection.", "logit_", "vision_model.head.", "head."))
    return False
