"""The configuration files of published networks: the keys that each network here reads, and the values it refuses.

Data only, no library is loaded. A key whose effect is fixed in the graph or the program may have only one value.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewright.export.weights.config import Config

__all__ = [
    "BIT_PROCESSOR",
    "CLIP_PROCESSOR",
    "CLIP_TEXT",
    "CLIP_TEXT_PROJECTED",
    "CLIP_VISION",
    "DDIM",
    "DDPM",
    "DINOV2",
    "DINOV3",
    "EULER",
    "FLOW",
    "FLUX",
    "NOISE_SCHEDULERS",
    "REDUX",
    "SIGLIP",
    "SIGLIP_PROCESSOR",
    "T5",
    "UNET",
    "VAE",
]

ACTIVATIONS = ("gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu", "swish")
HIDDEN_ACT = {"hidden_act": ACTIVATIONS}


def _fill(values: Mapping[str, Any]) -> str | None:
    axes, width = values["axes_dims_rope"], values["attention_head_dim"]
    if len(axes) != 3 or sum(axes) != width or any(axis % 2 for axis in axes):
        return f"'axes_dims_rope' {list(axes)} are no three even parts of 'attention_head_dim' {width}"
    channels_in, channels_out = values["in_channels"], values["out_channels"] or values["in_channels"]
    if channels_in <= 2 * channels_out:
        return (
            f"'in_channels' {channels_in} leave no room for an image and its mask beside 'out_channels' {channels_out}:"
            " this is another FLUX, and FLUX.1-Fill-dev is needed"
        )
    return None


FLUX = Config(
    ("FluxTransformer2DModel",),
    {
        "in_channels": 64,
        "out_channels": None,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": False,
        "axes_dims_rope": (16, 56, 56),
    },
    must={"patch_size": 1, "guidance_embeds": True},
    silent={"guidance_embeds": False},
    fits=_fill,
)


def _blocks(values: Mapping[str, Any]) -> str | None:
    counts = {name: len(values[name]) for name in ("block_out_channels", "down_block_types", "up_block_types")}
    if len(set(counts.values())) > 1:
        return f"{', '.join(f'{name!r} has {count}' for name, count in counts.items())}: not one for each block"
    if groups := [width for width in values["block_out_channels"] if width % values["norm_num_groups"]]:
        return f"'block_out_channels' {groups[0]} do not divide into 'norm_num_groups' {values['norm_num_groups']}"
    return None


VAE = Config(
    ("AutoencoderKL",),
    {
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "block_out_channels": (64,),
        "layers_per_block": 1,
        "act_fn": "silu",
        "latent_channels": 4,
        "norm_num_groups": 32,
        "scaling_factor": 0.18215,
        "shift_factor": None,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    },
    must={
        "in_channels": 3,
        "out_channels": 3,
        "latents_mean": None,
        "latents_std": None,
        "mid_block_add_attention": True,
    },
    choices={
        "down_block_types": ("DownEncoderBlock2D",),
        "up_block_types": ("UpDecoderBlock2D",),
        "act_fn": ACTIVATIONS,
    },
    moot=("sample_size", "force_upcast"),
    fits=_blocks,
)


def _feed_forward(values: Mapping[str, Any]) -> str | None:
    kind = values["feed_forward_proj"]
    gated, act = kind.startswith("gated-"), kind.removeprefix("gated-")
    derived = {"is_gated_act": gated, "dense_act_fn": "gelu_new" if kind == "gated-gelu" else act}
    for name, value in derived.items():
        if values.get(name, value) != value:
            return f"{name!r} is {values[name]!r}, which 'feed_forward_proj' {kind!r} does not mean"
    return None


T5 = Config(
    ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel", "t5"),
    {
        "vocab_size": 32128,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 2048,
        "num_layers": 6,
        "num_heads": 8,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "relu",
    },
    must={"is_decoder": False},
    choices={"feed_forward_proj": ("relu", "gated-gelu", "gated-silu")},
    moot=(
        *("num_decoder_layers", "is_encoder_decoder", "scale_decoder_outputs"),
        *("eos_token_id", "n_positions", "is_gated_act", "dense_act_fn"),
    ),
    fits=_feed_forward,
)


def _ended(values: Mapping[str, Any]) -> str | None:
    """The graph ends a text at its highest id; files write that as 2, or as the last id of the vocabulary."""
    end, last = values.get("eos_token_id", values["vocab_size"] - 1), values["vocab_size"] - 1
    if end not in (2, last):
        return f"'eos_token_id' is {end!r}, where texts end with the last id, {last}"
    return _heads(values)


def _heads(values: Mapping[str, Any]) -> str | None:
    width, heads = values["hidden_size"], values["num_attention_heads"]
    return f"'hidden_size' {width} is no multiple of 'num_attention_heads' {heads}" if width % heads else None


CLIP_TEXT = Config(
    ("CLIPTextModel", "CLIPTextModelWithProjection", "clip_text_model"),
    {
        "vocab_size": 49408,
        "hidden_size": 512,
        "intermediate_size": 2048,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,  # nothing reads it, but the library warns if it lies outside of the vocabulary
    },
    must={"is_decoder": False},
    choices=HIDDEN_ACT,
    moot=("eos_token_id",),
    wrappers=("CLIPModel", "clip"),
    inner="text_config",
    fits=_ended,
)
CLIP_TEXT_PROJECTED = replace(CLIP_TEXT, classes=("CLIPTextModelWithProjection", "clip_text_model"))


def _patches(values: Mapping[str, Any]) -> str | None:
    side, patch = values["image_size"], values["patch_size"]
    return f"'image_size' {side} is less than a 'patch_size' {patch}" if side < patch else _heads(values)


CLIP_VISION = Config(
    ("CLIPVisionModelWithProjection", "clip_vision_model"),
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "projection_dim": 512,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    must={"num_channels": 3},
    choices=HIDDEN_ACT,
    wrappers=("CLIPModel", "clip"),
    inner="vision_config",
    fits=_patches,
)
SIGLIP = Config(
    ("SiglipVisionModel", "siglip_vision_model"),
    {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "image_size": 224,
        "patch_size": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    must={"num_channels": 3},
    choices=HIDDEN_ACT,
    moot=("vision_use_head", "projection_dim"),  # the features are read before the head
    wrappers=("SiglipModel", "siglip"),
    inner="vision_config",
    fits=_patches,
)
REDUX = Config(("ReduxImageEncoder",), {"redux_dim": 1152, "txt_in_features": 4096})
_BACKBONE = ("apply_layernorm", "reshape_hidden_states", "stage_names", "out_features", "out_indices")
DINOV2 = Config(
    ("Dinov2Model", "dinov2"),
    {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "mlp_ratio": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
        "image_size": 224,
        "patch_size": 14,
        "qkv_bias": True,
        "use_swiglu_ffn": False,
    },
    must={"num_channels": 3},
    choices=HIDDEN_ACT,
    moot=("layerscale_value", "use_mask_token", *_BACKBONE),
    fits=_patches,
)
DINOV3 = Config(
    ("DINOv3ViTModel", "dinov3_vit"),
    {
        "patch_size": 16,
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "query_bias": True,
        "key_bias": False,
        "value_bias": True,
        "proj_bias": True,
        "mlp_bias": True,
        "use_gated_mlp": False,
        "num_register_tokens": 0,
    },
    must={"num_channels": 3},
    choices=HIDDEN_ACT,
    # these change positions in training only, and positions fit any number of patches
    moot=("layerscale_value", "image_size", "pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale", *_BACKBONE),
    fits=_heads,
)


def _unet(values: Mapping[str, Any]) -> str | None:
    if complaint := _blocks(values):
        return complaint
    widths = values["block_out_channels"]
    for name in ("attention_head_dim", "transformer_layers_per_block"):
        if isinstance(values[name], tuple) and len(values[name]) != len(widths):
            return f"{name!r} is neither a number nor a list with one for each block"
    heads = values["attention_head_dim"]  # despite its name, this is the number of heads
    for width, count in zip(widths, heads if isinstance(heads, tuple) else (heads,) * len(widths), strict=True):
        if width % count:
            return f"'block_out_channels' {width} do not divide into 'attention_head_dim' {count}"
    needed = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    return next((f"{name!r} is not given" for name in needed if values[name] is None), None)


UNET = Config(
    ("UNet2DConditionModel",),
    {
        "sample_size": None,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (320, 640, 1280, 1280),
        "layers_per_block": 2,
        "act_fn": "silu",
        "norm_num_groups": 32,
        "norm_eps": 1e-5,
        "cross_attention_dim": 1280,
        "transformer_layers_per_block": 1,
        "attention_head_dim": 8,
        "use_linear_projection": False,
        "addition_embed_type": None,
        "addition_time_embed_dim": None,
        "projection_class_embeddings_input_dim": None,
    },
    must={
        "in_channels": 4,
        "out_channels": 4,
        "act_fn": "silu",
        "addition_embed_type": "text_time",
        "center_input_sample": False,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "only_cross_attention": False,
        "mid_block_only_cross_attention": None,
        "downsample_padding": 1,
        "mid_block_scale_factor": 1,
        "reverse_transformer_layers_per_block": None,
        "encoder_hid_dim": None,
        "encoder_hid_dim_type": None,
        "num_attention_heads": None,
        "dual_cross_attention": False,
        "class_embed_type": None,
        "num_class_embeds": None,
        "class_embeddings_concat": False,
        "upcast_attention": False,
        "resnet_time_scale_shift": "default",
        "resnet_skip_time_act": False,
        "resnet_out_scale_factor": 1.0,
        "time_embedding_type": "positional",
        "time_embedding_dim": None,
        "time_embedding_act_fn": None,
        "timestep_post_act": None,
        "time_cond_proj_dim": None,
        "conv_in_kernel": 3,
        "conv_out_kernel": 3,
        "attention_type": "default",
        "cross_attention_norm": None,
    },
    silent={"addition_embed_type": None},
    choices={
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    lists=("attention_head_dim", "transformer_layers_per_block"),
    moot=("addition_embed_type_num_heads",),
    fits=_unet,
)


def _rising(values: Mapping[str, Any]) -> str | None:
    few, many = values["base_image_seq_len"], values["max_image_seq_len"]
    return None if few < many else f"'base_image_seq_len' {few} is not below 'max_image_seq_len' {many}"


FLOW = Config(
    ("FlowMatchEulerDiscreteScheduler",),
    {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096},
    must={
        "num_train_timesteps": 1000,
        "use_dynamic_shifting": True,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
    silent={"use_dynamic_shifting": False},
    moot=("shift",),  # dynamic shifting replaces it
    fits=_rising,
    file="scheduler_config.json",
)
# the sampler is ours, DDIM or DDPM: it reads the noise levels of any scheduler's file, which must not ask for clipping
_LEVELS = {
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "set_alpha_to_one": True,
    "steps_offset": 0,
}
_SAMPLING: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
    "clip_sample": False,
    "thresholding": False,
}
DDIM = Config(
    ("DDIMScheduler",),
    _LEVELS,
    must=_SAMPLING,
    silent={"clip_sample": True},
    choices={"beta_schedule": ("linear", "scaled_linear")},
    moot=("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio", "skip_prk_steps"),
    file="scheduler_config.json",
)
DDPM = replace(DDIM, classes=("DDPMScheduler",), must=_SAMPLING | {"variance_type": "fixed_small"})
EULER = replace(
    DDIM,
    classes=("EulerDiscreteScheduler",),
    silent={"clip_sample": True, "timestep_spacing": "linspace"},
    # these choose the steps between noise levels, which the sampler does itself
    moot=(
        *DDIM.moot,
        *("interpolation_type", "timestep_type", "final_sigmas_type", "sigma_min", "sigma_max"),
        *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    ),
)
NOISE_SCHEDULERS = (EULER, DDPM, DDIM)

_PIXELS: dict[str, Any] = {
    "do_resize": True,
    "resample": 3,  # Pillow's bicubic
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}
_CLIP_PIXELS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}


def _square(values: Mapping[str, Any]) -> str | None:
    """Refuse sizes that give no square. Images are squeezed into one, or resized and cut out at the centre."""
    for name in ("image_mean", "image_std"):
        numbers = values.get(name, (1, 1, 1))
        if len(numbers) != 3 or (name == "image_std" and 0 in numbers):
            return f"{name!r} {list(numbers)} does not fit three channels"
    size, crop = values["size"], values.get("crop_size")
    if (size.keys() == {"shortest_edge"}) == (crop is None) or (crop or size).keys() != {"height", "width"}:
        return f"'size' {size} and 'crop_size' {crop} make no square"
    sides = [*size.values(), *(crop or {}).values()]
    if not all(type(side) is int and side > 0 for side in sides) or len(set((crop or size).values())) > 1:
        return f"'size' {size} and 'crop_size' {crop} make no square"
    return f"'crop_size' {crop} is larger than 'size' {size}" if crop and max(crop.values()) > sides[0] else None


SIGLIP_PROCESSOR = Config(
    ("SiglipImageProcessor", "SiglipImageProcessorFast"),
    {"size": {"height": 224, "width": 224}, "image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)},
    must=_PIXELS | {"do_center_crop": False},
    moot=("do_convert_rgb", "data_format", "input_data_format", "default_to_square", "do_pad"),
    number={"size": ("height", "width")},
    fits=_square,
    file="preprocessor_config.json",
)
CLIP_PROCESSOR = replace(
    SIGLIP_PROCESSOR,
    classes=("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorFast"),
    defaults={"size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224}} | _CLIP_PIXELS,
    must=_PIXELS | {"do_center_crop": True},
    number={"size": ("shortest_edge",), "crop_size": ("height", "width")},
)
BIT_PROCESSOR = replace(
    CLIP_PROCESSOR,
    classes=("BitImageProcessor", "BitImageProcessorFast"),
)
