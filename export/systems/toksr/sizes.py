"""The sizes of TokSR: presets, and what the user's files say of theirs.

Tokenizer and denoiser come without configuration: their shapes decide, but for heads. CLIP's folder has a config.json.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tilewright.export.networks.configs import CLIP_TEXT
from tilewright.export.system import Option, Preset, Tensors, UserFiles, finite
from tilewright.export.weights.sizes import Said, blocks, config_beside, file_of, network_sizes, shapes_of
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["PRESETS", "PUBLISHED_CLIP", "SIZE_OPTIONS", "sizes_of"]

HEAD_WIDTH = 64  # of every published size, which files do not tell
# no graph reads them: texts end at the highest id, and their pooled state is not projected
UNREAD = ("bos_token_id", "projection_dim")

_BASE = {"width": 768, "layers": 12, "heads": 12}
_LARGE = {"width": 1024, "layers": 24, "heads": 16}
_SMALL = {"width": 32, "layers": 2, "heads": 2}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_PUBLISHED = {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768, "scale": 0.7525}
PRESETS: dict[str, dict[str, Any]] = {
    "full": {  # the public TA-TiTok, whose encoder reads no words
        "tokenizer": _PUBLISHED | {"encoder": _BASE | {"text": False}, "decoder": _LARGE},
        "clip": _CLIP,
        "dit": _BASE,
        "overlap": 32,
    },
    "textok": {  # the paper's own tokenizer
        "tokenizer": _PUBLISHED | {"encoder": _BASE | {"text": True}, "decoder": _BASE},
        "clip": _CLIP,
        "dit": _BASE,
        "overlap": 32,
    },
    "tiny": {
        "tokenizer": {
            "image": 32,
            "patch": 8,
            "latents": 4,
            "token": 4,
            "words": 8,
            "text_width": 16,
            "scale": 0.7525,
            "encoder": _SMALL | {"text": True},
            "decoder": _SMALL,
        },
        "clip": {
            "vocab_size": 64,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 8,
        },
        "dit": _SMALL,
        "overlap": 8,
    },
}
PUBLISHED_CLIP = {  # of clip-vit-large-patch14-336, less what serves training and generation
    "architectures": ["CLIPModel"],
    "logit_scale_init_value": 2.6592,
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 12,
        "num_hidden_layers": 12,
        "pad_token_id": 1,
        "projection_dim": 768,
        "vocab_size": 49408,
    },
    "vision_config": {
        "hidden_act": "quick_gelu",
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
SIZE_OPTIONS = {
    "encoder_heads": Option("attention heads of the tokenizer's encoder (default: one for 64 of its width)", kind=int),
    "decoder_heads": Option("attention heads of the tokenizer's decoder (default: one for 64 of its width)", kind=int),
    "dit_heads": Option("attention heads of the denoiser (default: one for 64 of its width)", kind=int),
    "token_scale": Option("factor of the tokenizer's latents (default: 0.7525)", kind=finite),
}
TELLING = {  # tensors that show a tokenizer's sizes -> how many axes they have
    "latent_tokens": 2,
    "encoder.patch_embed.weight": 4,
    "encoder.conv_out.weight": 4,
    "encoder.positional_embedding": 2,
    "encoder.transformer.0.ln_1.weight": 1,
    "decoder.decoder_embed.weight": 2,
    "decoder.text_guidance_proj.weight": 2,
    "decoder.text_guidance_positional_embedding": 2,
    "decoder.transformer.0.ln_1.weight": 1,
}
DIT_TELLING = {"dit.embed.weight": 2, "dit.positions.weight": 2, "dit.label.weight": 2, "dit.blocks.0.ln_1.weight": 1}
CLIP_TELLING = {
    "embeddings.token_embedding.weight": 2,
    "embeddings.position_embedding.weight": 2,
    "encoder.layers.0.mlp.fc1.weight": 2,
}
VAE = "give tatitok_bl32_vae.bin, or another text-aware VAE"


def sizes_of(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> dict[str, Any]:
    """The sizes of every network, which must fit each other, and the pixels that tiles share."""
    told = {
        name: file_of(files.tensors[name]) if name in files.tensors else f"preset {preset.name!r}"
        for name in ("tokenizer", "text_encoder", "dit")
    }
    tokenizer, clip = _tokenizer(preset, options, files.tensors.get("tokenizer")), _clip(preset, files)
    read, given = (tokenizer["words"], tokenizer["text_width"]), (clip["max_position_embeddings"], clip["hidden_size"])
    if read != given:
        raise _refusal(
            f"tokenizer {told['tokenizer']}: reads {read[0]} words of {read[1]} numbers, CLIP {told['text_encoder']}"
            f" gives {given[0]} of {given[1]}; give the two that belong together"
        )
    image, patch, usual = tokenizer["image"], tokenizer["patch"], preset.sizes
    share = image * usual["overlap"] // usual["tokenizer"]["image"]
    sizes = {
        "tokenizer": tokenizer,
        "clip": clip,
        "dit": _dit(preset, options, files.tensors.get("dit"), tokenizer, told["tokenizer"]),
        "overlap": min(max(share, patch), image // 2) // patch * patch,
    }
    if complaint := next(_complaints(sizes, told), None):
        raise _refusal(complaint)
    return sizes


def _complaints(sizes: Mapping[str, Any], told: Mapping[str, str]) -> Iterator[str]:
    """What is wrong with sizes together."""
    tokenizer, dit = sizes["tokenizer"], sizes["dit"]
    parts = {"encoder": tokenizer["encoder"], "decoder": tokenizer["decoder"], "dit": dit}
    for name, part in parts.items():
        if part["heads"] < 1 or part["width"] % part["heads"]:
            source = told["dit" if name == "dit" else "tokenizer"]
            yield f"{name} {source}: {part['heads']} heads do not divide its width {part['width']}; give --{name}-heads"
    if not tokenizer["scale"]:
        yield f"--token-scale {tokenizer['scale']}: tokens are divided by it; give the factor of training"


def _usual(preset: Preset, part: Mapping[str, Any], width: int | None) -> int:
    """The usual heads of a width, where a file has one and no preset was named."""
    own: int = part["heads"]
    return own if preset.asked or width is None or width % HEAD_WIDTH else width // HEAD_WIDTH


def _tokenizer(preset: Preset, options: Mapping[str, Any], tensors: Tensors | None) -> dict[str, Any]:
    usual = dict(preset.sizes["tokenizer"])
    halves = {name: usual.pop(name) for name in ("encoder", "decoder")}
    shown = _shown_tokenizer(tensors) if tensors else {}
    shown_halves = {name: shown.pop(name, None) for name in halves}

    def said(sizes: Mapping[str, Any] | None) -> Said | None:
        return Said(f"weights {file_of(tensors)}", sizes) if tensors and sizes else None

    scale = {"scale": ("--token-scale", options.get("token_scale"))}
    sizes = network_sizes("tokenizer", preset, usual, None, said(shown), scale)
    for name, half in halves.items():
        seen = said(shown_halves[name])
        half = half | {"heads": _usual(preset, half, seen.sizes["width"] if seen else None)}
        flag = {"heads": (f"--{name}-heads", options.get(f"{name}_heads"))}
        sizes[name] = network_sizes(f"tokenizer's {name}", preset, half, None, seen, flag)
    return sizes


def _shown_tokenizer(tensors: Tensors) -> dict[str, Any]:
    """The sizes that a tokenizer's tensors show; refused where it is of another kind."""
    file = file_of(tensors)
    if codes := sorted(key for key in tensors.tensors if key.startswith("quantize.")):
        raise _refusal(f"tokenizer {file}: has a quantiser ({codes[0]!r}), TokSR's tokens are continuous; {VAE}")
    shapes = shapes_of("tokenizer", tensors, TELLING, f"no tokenizer that can be used; {VAE}")
    patch = shapes["encoder.patch_embed.weight"][2]
    cells, inner = shapes["encoder.positional_embedding"]
    width, token = shapes["decoder.decoder_embed.weight"]
    if shapes["encoder.conv_out.weight"][0] != 2 * token:
        raise _refusal(f"tokenizer {file}: its encoder gives no mean and variance of {token} numbers; {VAE}")
    return {
        "image": patch * math.isqrt(cells - 1),
        "patch": patch,
        "latents": shapes["latent_tokens"][0],
        "token": token,
        "words": shapes["decoder.text_guidance_positional_embedding"][0],
        "text_width": shapes["decoder.text_guidance_proj.weight"][1],
        "encoder": {
            "width": inner,
            "layers": blocks(shapes, "encoder.transformer."),
            "text": "encoder.text_guidance_proj.weight" in shapes,
        },
        "decoder": {"width": width, "layers": blocks(shapes, "decoder.transformer.")},
    }


def _dit(
    preset: Preset, options: Mapping[str, Any], tensors: Tensors | None, tokenizer: Mapping[str, Any], source: str
) -> dict[str, Any]:
    """The denoiser's sizes; refused where it was trained with another tokenizer."""
    usual = preset.sizes["dit"] | {"output_projection": True}
    shown = None
    if tensors:
        file, advice = file_of(tensors), "no denoiser that can be used; docs/toksr.md names its tensors"
        shapes = shapes_of("denoiser", tensors, DIT_TELLING, advice, lambda key: f"dit.{key.removeprefix('dit.')}")
        width, token = shapes["dit.embed.weight"]
        taken = [shapes["dit.positions.weight"][0], token, shapes["dit.label.weight"][1]]
        made = [tokenizer[name] for name in ("latents", "token", "text_width")]
        if taken != made:
            raise _refusal(
                f"denoiser {file}: is for {taken[0]} tokens of {taken[1]} numbers, words of {taken[2]}; the tokenizer"
                f" {source} gives {made[0]} of {made[1]}, words of {made[2]}; give the two that were trained together"
            )
        projected = any(key.endswith(".attn.out.weight") for key in shapes)
        layers = blocks(shapes, "dit.blocks.")
        shown = Said(f"weights {file}", {"width": width, "layers": layers, "output_projection": projected})
        usual["heads"] = _usual(preset, usual, width)
    return network_sizes("denoiser", preset, usual, None, shown, {"heads": ("--dit-heads", options.get("dit_heads"))})


def _clip(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """The text tower's sizes, which its config.json says."""
    usual = {name: size for name, size in {**CLIP_TEXT.defaults, **preset.sizes["clip"]}.items() if name not in UNREAD}
    tensors = files.tensors.get("text_encoder")
    if tensors is None:
        return network_sizes("CLIP", preset, usual, None, None)
    advice = "give the folder of CLIP ViT-L/14-336"
    shapes = shapes_of("CLIP", tensors, CLIP_TELLING, advice, lambda key: key.removeprefix("text_model."))
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    shown = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": blocks(shapes, "encoder.layers."),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }
    config = config_beside(CLIP_TEXT, files.places["text_encoder"])
    if config:
        config = Said(config.source, {name: size for name, size in config.sizes.items() if name not in UNREAD})
    elif not preset.asked:
        usual["num_attention_heads"] = max(1, width // HEAD_WIDTH)
    return network_sizes("CLIP", preset, usual, config, Said(f"weights {file_of(tensors)}", shown))


def _refusal(text: str) -> InputError:
    return InputError(one_line(text))
