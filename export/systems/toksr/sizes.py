"""The sizes of TokSR: its presets, and reading sizes from the user's files.

Tokenizer and denoiser have no configuration file: the shapes of their tensors tell all sizes but the number of heads.
CLIP's folder has a config.json.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tilewright.export.networks.configs import CLIP_TEXT
from tilewright.export.system import Option, Preset, Tensors, UserFiles, finite
from tilewright.export.weights.sizes import FileSizes, blocks, config_beside, file_of, network_sizes, shapes_of
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["PRESETS", "PUBLISHED_CLIP", "SIZE_OPTIONS", "sizes_of"]

HEAD_WIDTH = 64  # in every published size; files do not tell it
# no graph reads these: a text ends at the highest id, and its pooled state is not projected
UNREAD = ("bos_token_id", "projection_dim")

_BASE = {"width": 768, "layers": 12, "heads": 12}
_LARGE = {"width": 1024, "layers": 24, "heads": 16}
_SMALL = {"width": 32, "layers": 2, "heads": 2}
_CLIP = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_PUBLISHED = {"image": 256, "patch": 16, "latents": 32, "token": 16, "words": 77, "text_width": 768, "scale": 0.7525}
PRESETS: dict[str, dict[str, Any]] = {
    "full": {  # the public TA-TiTok; its encoder reads no words
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
PUBLISHED_CLIP = {  # config.json of clip-vit-large-patch14-336 without the keys of training and generation
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
SIZE_TENSORS = {  # tensors whose shapes tell a tokenizer's sizes -> their number of axes
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
DIT_SIZE_TENSORS = {
    "dit.embed.weight": 2,
    "dit.positions.weight": 2,
    "dit.label.weight": 2,
    "dit.blocks.0.ln_1.weight": 1,
}
CLIP_SIZE_TENSORS = {
    "embeddings.token_embedding.weight": 2,
    "embeddings.position_embedding.weight": 2,
    "encoder.layers.0.mlp.fc1.weight": 2,
}
VAE = "give tatitok_bl32_vae.bin, or another text-aware VAE"


def sizes_of(preset: Preset, options: Mapping[str, Any], files: UserFiles) -> dict[str, Any]:
    """The sizes of every network, which must fit each other, and the overlap of tiles."""
    sources = {
        name: file_of(files.tensors[name]) if name in files.tensors else f"preset {preset.name!r}"
        for name in ("tokenizer", "text_encoder", "dit")
    }
    tokenizer, clip = _tokenizer(preset, options, files.tensors.get("tokenizer")), _clip(preset, files)
    words, width = tokenizer["words"], tokenizer["text_width"]
    clip_words, clip_width = clip["max_position_embeddings"], clip["hidden_size"]
    if (words, width) != (clip_words, clip_width):
        raise _refusal(
            f"tokenizer {sources['tokenizer']}: reads {words} words of {width} numbers, CLIP {sources['text_encoder']}"
            f" gives {clip_words} of {clip_width}; give the two that belong together"
        )
    image, patch, usual = tokenizer["image"], tokenizer["patch"], preset.sizes
    share = image * usual["overlap"] // usual["tokenizer"]["image"]
    sizes = {
        "tokenizer": tokenizer,
        "clip": clip,
        "dit": _dit(preset, options, files.tensors.get("dit"), tokenizer, sources["tokenizer"]),
        "overlap": min(max(share, patch), image // 2) // patch * patch,
    }
    if complaint := next(_complaints(sizes, sources), None):
        raise _refusal(complaint)
    return sizes


def _complaints(sizes: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """Sizes that do not fit each other, one sentence each."""
    tokenizer, dit = sizes["tokenizer"], sizes["dit"]
    parts = {"encoder": tokenizer["encoder"], "decoder": tokenizer["decoder"], "dit": dit}
    for name, part in parts.items():
        if part["heads"] < 1 or part["width"] % part["heads"]:
            source = sources["dit" if name == "dit" else "tokenizer"]
            yield f"{name} {source}: {part['heads']} heads do not divide its width {part['width']}; give --{name}-heads"
    if not tokenizer["scale"]:
        yield f"--token-scale {tokenizer['scale']}: tokens are divided by it; give the factor of training"


def _usual_heads(preset: Preset, part: Mapping[str, Any], width: int | None) -> int:
    """The number of heads: the preset's if the user named it, else one for 64 of the width in the file."""
    heads: int = part["heads"]
    return heads if preset.explicit or width is None or width % HEAD_WIDTH else width // HEAD_WIDTH


def _tokenizer(preset: Preset, options: Mapping[str, Any], tensors: Tensors | None) -> dict[str, Any]:
    usual = dict(preset.sizes["tokenizer"])
    halves = {name: usual.pop(name) for name in ("encoder", "decoder")}
    shape_sizes = _tokenizer_shape_sizes(tensors) if tensors else {}
    half_shape_sizes = {name: shape_sizes.pop(name, None) for name in halves}

    def file_sizes(sizes: Mapping[str, Any] | None) -> FileSizes | None:
        return FileSizes(f"weights {file_of(tensors)}", sizes) if tensors and sizes else None

    scale = {"scale": ("--token-scale", options.get("token_scale"))}
    sizes = network_sizes("tokenizer", preset, usual, None, file_sizes(shape_sizes), scale)
    for name, half in halves.items():
        half_sizes = file_sizes(half_shape_sizes[name])
        half = half | {"heads": _usual_heads(preset, half, half_sizes.sizes["width"] if half_sizes else None)}
        flag = {"heads": (f"--{name}-heads", options.get(f"{name}_heads"))}
        sizes[name] = network_sizes(f"tokenizer's {name}", preset, half, None, half_sizes, flag)
    return sizes


def _tokenizer_shape_sizes(tensors: Tensors) -> dict[str, Any]:
    """The sizes that the shapes of a tokenizer's tensors tell. Another kind of tokenizer is refused."""
    file = file_of(tensors)
    if codes := sorted(key for key in tensors.tensors if key.startswith("quantize.")):
        raise _refusal(f"tokenizer {file}: has a quantiser ({codes[0]!r}), TokSR's tokens are continuous; {VAE}")
    shapes = shapes_of("tokenizer", tensors, SIZE_TENSORS, f"no tokenizer that can be used; {VAE}")
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
    """The denoiser's sizes. A denoiser for another tokenizer is refused."""
    usual = preset.sizes["dit"] | {"output_projection": True}
    shape_sizes = None
    if tensors:
        file, advice = file_of(tensors), "no denoiser that can be used; docs/toksr.md names its tensors"
        shapes = shapes_of("denoiser", tensors, DIT_SIZE_TENSORS, advice, lambda key: f"dit.{key.removeprefix('dit.')}")
        width, token = shapes["dit.embed.weight"]
        inputs = [shapes["dit.positions.weight"][0], token, shapes["dit.label.weight"][1]]
        outputs = [tokenizer[name] for name in ("latents", "token", "text_width")]
        if inputs != outputs:
            raise _refusal(
                f"denoiser {file}: is for {inputs[0]} tokens of {inputs[1]} numbers, words of {inputs[2]};"
                f" the tokenizer {source} gives {outputs[0]} of {outputs[1]}, words of {outputs[2]};"
                " give the two that were trained together"
            )
        projected = any(key.endswith(".attn.out.weight") for key in shapes)
        layers = blocks(shapes, "dit.blocks.")
        shape_sizes = FileSizes(f"weights {file}", {"width": width, "layers": layers, "output_projection": projected})
        usual["heads"] = _usual_heads(preset, usual, width)
    return network_sizes(
        "denoiser", preset, usual, None, shape_sizes, {"heads": ("--dit-heads", options.get("dit_heads"))}
    )


def _clip(preset: Preset, files: UserFiles) -> dict[str, Any]:
    """The sizes of CLIP's text encoder, from its config.json."""
    usual = {name: size for name, size in {**CLIP_TEXT.defaults, **preset.sizes["clip"]}.items() if name not in UNREAD}
    tensors = files.tensors.get("text_encoder")
    if tensors is None:
        return network_sizes("CLIP", preset, usual, None, None)
    advice = "give the folder of CLIP ViT-L/14-336"
    shapes = shapes_of("CLIP", tensors, CLIP_SIZE_TENSORS, advice, lambda key: key.removeprefix("text_model."))
    vocabulary, width = shapes["embeddings.token_embedding.weight"]
    shape_sizes = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": blocks(shapes, "encoder.layers."),
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
    }
    config = config_beside(CLIP_TEXT, files.places["text_encoder"])
    if config:
        config = FileSizes(config.source, {name: size for name, size in config.sizes.items() if name not in UNREAD})
    elif not preset.explicit:
        usual["num_attention_heads"] = max(1, width // HEAD_WIDTH)
    return network_sizes("CLIP", preset, usual, config, FileSizes(f"weights {file_of(tensors)}", shape_sizes))


def _refusal(text: str) -> InputError:
    return InputError(one_line(text))
