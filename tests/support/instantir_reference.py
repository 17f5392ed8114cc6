"""InstantIR in eager PyTorch from diffusers' and transformers' own parts: what the exporter's bundles are held to."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, Dinov2Config, Dinov2Model

Files = dict[str, dict[str, Any]]
Residuals = tuple[list[Tensor], Tensor]
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}
SAMPLERS: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}


@dataclass(frozen=True)
class Sizes:
    """The constructor arguments of every network."""

    unet: dict[str, Any]
    vae: dict[str, Any]
    text: dict[str, Any]
    text_2: dict[str, Any]
    dino: dict[str, Any]
    dino_side: int  # what DINOv2 is run at
    dino_resize: int  # the shortest side before the centre crop to dino_side
    resampler: dict[str, int]
    sft: int
    rank: int
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # of colours that DINOv2 sees
    deviation: tuple[float, ...] = (0.229, 0.224, 0.225)
    schedule: dict[str, Any] = field(default_factory=lambda: SCHEDULE)

    @property
    def scale(self) -> int:
        """Pixels per latent pixel."""
        return 2 ** (len(self.vae["block_out_channels"]) - 1)


def _unet(*widths: int, layers: int, depths: tuple[int, ...], heads: tuple[int, ...], **rest: int) -> dict[str, Any]:
    later = len(widths) - 1
    return {
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * later,
        "up_block_types": ("CrossAttnUpBlock2D",) * later + ("UpBlock2D",),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "transformer_layers_per_block": depths,
        "attention_head_dim": heads,  # head counts, whatever the name says
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        **rest,
    }


def _vae(*widths: int, layers: int, groups: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "latent_channels": 4,
        "layers_per_block": layers,
        "norm_num_groups": groups,
        "scaling_factor": 0.13025,
    }


def _tower(width: int, inner: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    """As SDXL's configs have it, whose eos_token_id of 2 has CLIP pool at the largest id."""
    named = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return named | {"num_attention_heads": heads, "eos_token_id": 2, **rest}


def _dino(width: int, layers: int, heads: int, side: int) -> dict[str, Any]:
    named = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return named | {"patch_size": 14, "image_size": side}


def _resampler(dim: int, depth: int, heads: int, head_width: int, queries: int, **widths: int) -> dict[str, int]:
    named = {"dim": dim, "depth": depth, "heads": heads, "head_width": head_width, "queries": queries}
    return named | widths | {"multiple": 4}


_TINY_WORDS = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 62}
_TINY_ADDED = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
_TINY_UNET = {"sample_size": 64, "cross_attention_dim": 32, "norm_num_groups": 8, **_TINY_ADDED}
_FULL_ADDED = {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
_FULL_UNET = {"sample_size": 128, "cross_attention_dim": 2048, **_FULL_ADDED}
TINY = Sizes(
    unet=_unet(16, 32, layers=1, depths=(1, 2), heads=(2, 4), **_TINY_UNET),
    vae=_vae(8, 16, layers=1, groups=4),
    text=_tower(16, 32, 2, 2, **_TINY_WORDS),
    text_2=_tower(16, 32, 2, 2, projection_dim=16, hidden_act="gelu", **_TINY_WORDS),
    dino=_dino(32, 2, 2, side=42),
    dino_side=28,
    dino_resize=32,
    resampler=_resampler(32, 2, 2, 16, 4, width_in=32, width_out=32),
    sft=16,
    rank=4,
)
FULL = Sizes(
    unet=_unet(320, 640, 1280, layers=2, depths=(1, 2, 10), heads=(5, 10, 20), **_FULL_UNET),
    vae=_vae(128, 256, 512, 512, layers=2, groups=32),
    text=_tower(768, 3072, 12, 12, vocab_size=49408),
    text_2=_tower(1280, 5120, 32, 20, projection_dim=1280, hidden_act="gelu", vocab_size=49408),
    dino=_dino(1024, 24, 16, side=518),
    dino_side=224,
    dino_resize=256,
    resampler=_resampler(1280, 4, 20, 64, 64, width_in=1024, width_out=2048),
    sft=128,
    rank=64,
)


class PerceiverAttention(nn.Module):
    """Latents attend to the image tokens and to themselves."""

    def __init__(self, dim: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_width, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_width, bias=False)
        self.to_out = nn.Linear(heads * head_width, dim, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        """What is added to the latents."""
        image, latents = self.norm1(image), self.norm2(latents)
        q = self.to_q(latents)
        k, v = self.to_kv(torch.cat([image, latents], dim=1)).chunk(2, dim=-1)
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v))
        scale = q.shape[-1] ** -0.25
        weights = ((q * scale) @ (k * scale).transpose(-1, -2)).softmax(dim=-1)
        return self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Resampler(nn.Module):
    """DINOv2 tokens to the image tokens of the UNet."""

    def __init__(
        self,
        dim: int,
        depth: int,
        heads: int,
        head_width: int,
        queries: int,
        width_in: int,
        width_out: int,
        multiple: int,
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.empty(1, queries, dim))
        self.proj_in, self.proj_out = nn.Linear(width_in, dim), nn.Linear(dim, width_out)
        self.norm_out = nn.LayerNorm(width_out)
        self.layers = nn.ModuleList()
        for _ in range(depth):
            up, down = nn.Linear(dim, multiple * dim, bias=False), nn.Linear(multiple * dim, dim, bias=False)
            feed_forward = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)
            self.layers.append(nn.ModuleList([PerceiverAttention(dim, heads, head_width), feed_forward]))

    def forward(self, features: Tensor) -> Tensor:
        """[B,N,width_in] to [B,queries,width_out]."""
        image, latents = self.proj_in(features), self.latents.expand(len(features), -1, -1)
        for attention, feed_forward in self.layers:
            latents = latents + attention(image, latents)
            latents = latents + feed_forward(latents)
        return self.norm_out(self.proj_out(latents))


class AdaLayerNorm(nn.Module):
    """A layer norm shifted and scaled by the time embedding."""

    def __init__(self, width: int, temb: int) -> None:
        super().__init__()
        self.linear = nn.Linear(temb, 2 * width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        """[B,N,width] by [B,temb]."""
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, dim=-1)
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


class ImageAttention(nn.Module):
    """The processor of attn2: attention to the text plus time-aware attention to the image tokens."""

    def __init__(self, width: int, context: int, temb: int) -> None:
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)
        self.ln_k_ip, self.ln_v_ip = AdaLayerNorm(width, temb), AdaLayerNorm(width, temb)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        ip_hidden_states: Tensor | None = None,
    ) -> Tensor:
        """The names of the arguments are those that diffusers hands on without a warning."""
        assert encoder_hidden_states is not None and temb is not None and ip_hidden_states is not None
        assert attention_mask is None
        k, v = attn.to_k(encoder_hidden_states), attn.to_v(encoder_hidden_states)
        k_ip = self.ln_k_ip(self.to_k_ip(ip_hidden_states), temb)
        v_ip = self.ln_v_ip(self.to_v_ip(ip_hidden_states), temb)
        q, k, v, k_ip, v_ip = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), k, v, k_ip, v_ip)
        )
        both = F.scaled_dot_product_attention(q, k, v) + 1.0 * F.scaled_dot_product_attention(q, k_ip, v_ip)
        return attn.to_out[0](both.transpose(1, 2).flatten(2))


def embedding(network: Any, t: Tensor, pooled: Tensor, time_ids: Tensor) -> Tensor:
    """The `emb` of an SDXL network, before any activation."""
    time = network.time_embedding(network.time_proj(t.expand(len(pooled))))
    ids = network.add_time_proj(time_ids.flatten()).reshape(len(pooled), -1)
    return time + network.add_embedding(torch.cat([pooled, ids], dim=-1))


class Modulate(nn.Module):
    """Scales and shifts the reference's half by what the low-quality half says."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(width, hidden, 3, padding=1), nn.SiLU())
        self.mul, self.add = nn.Conv2d(hidden, width, 3, padding=1), nn.Conv2d(hidden, width, 3, padding=1)

    def forward(self, both: Tensor) -> Tensor:
        """[B,C,2h,w], the low-quality half on top, to [B,C,h,w]."""
        low, reference = both.chunk(2, dim=2)
        shared = self.mlp_shared(low)
        return reference * (1 + self.mul(shared)) + self.add(shared)


class Aggregator(nn.Module):
    """SDXL's encoder without text attention over the low-quality latent and the reference, one above the other."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        unet = UNet2DConditionModel(**sizes.unet)
        for block in unet.modules():
            if isinstance(block, BasicTransformerBlock):
                block.attn2 = block.norm2 = None
        self.conv_in, self.ref_conv_in = unet.conv_in, copy.deepcopy(unet.conv_in)
        self.time_proj, self.time_embedding = unet.time_proj, unet.time_embedding
        self.add_time_proj, self.add_embedding = unet.add_time_proj, unet.add_embedding
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        widths = sizes.unet["block_out_channels"]
        of_residuals = [widths[0]]
        for i, width in enumerate(widths):
            of_residuals += [width] * (sizes.unet["layers_per_block"] + (i < len(widths) - 1))

        def head(width: int) -> nn.Sequential:
            return nn.Sequential(Modulate(width, sizes.sft), nn.Conv2d(width, width, 1))

        self.controlnet_down_blocks = nn.ModuleList(head(width) for width in of_residuals)
        self.controlnet_mid_block = head(widths[-1])

    def forward(self, y: Tensor, t: Tensor, reference: Tensor, pooled: Tensor, time_ids: Tensor) -> Residuals:
        """The residuals of the skips and of the middle, unscaled."""
        temb = embedding(self, t, pooled, time_ids)
        x = torch.cat([self.conv_in(y), self.ref_conv_in(reference)], dim=2)
        skips = [x]
        for block in self.down_blocks:
            x, new = block(x, temb)
            skips += new
        x = self.mid_block(x, temb)
        heads = self.controlnet_down_blocks
        return [head(skip) for head, skip in zip(heads, skips, strict=True)], self.controlnet_mid_block(x)


def networks(sizes: Sizes) -> dict[str, Any]:
    """Every network with meaningless weights."""
    unet = UNet2DConditionModel(**sizes.unet)
    temb, context = 4 * sizes.unet["block_out_channels"][0], sizes.unet["cross_attention_dim"]
    processors = dict(unet.attn_processors)
    for name in image_attentions(unet).values():
        width = unet.get_submodule(name.removesuffix(".processor")).to_q.out_features
        processors[name] = ImageAttention(width, context, temb)
    unet.set_attn_processor(processors)
    return {
        "unet": unet,
        "vae": AutoencoderKL(**sizes.vae),
        "text_encoder": CLIPTextModel(CLIPTextConfig(**sizes.text)),
        "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**sizes.text_2)),
        "dino": Dinov2Model(Dinov2Config(**sizes.dino)),
        "resampler": Resampler(**sizes.resampler),
        "aggregator": Aggregator(sizes),
    }


def image_attentions(unet: UNet2DConditionModel) -> dict[int, str]:
    """The adapter's index of every attn2 and the name of its processor in the UNet."""
    return {k: name for k, name in enumerate(unet.attn_processors) if ".attn2." in name}


# What the files call a module, and what this transformers does; DINOv2's attention alone was renamed within.
_DINO = [(f"attention.attention.{name}.", f"attention.{name[0]}_proj.") for name in ("query", "key", "value")]
_DINO += [("attention.output.dense.", "attention.o_proj."), ("mlp.weights_out.", "mlp.down_proj.")]
_LORA = re.compile(
    r"(^|\.)(attn1\.to_[qkv]|attn2\.to_q|to_out\.0|(to|ln)_[kv]_ip(\.linear)?|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2"
    r"|conv1|conv2|conv_shortcut|(down|up)samplers\.0\.conv|time_emb_proj)\.weight$"
)
_LORA_RESAMPLER = re.compile(r"(^|\.)(to_q|to_kv|to_out|proj_in|proj_out)\.weight$")
_IN_LORA = "encoder_hid_proj.image_projection_layers.0."
_SPELLINGS = ((".lora.down.weight", ".lora.up.weight"), (".lora_A.weight", ".lora_B.weight"))


def file_shapes(sizes: Sizes) -> dict[str, dict[str, Any]]:
    """What the published files hold: names to shapes, the adapter's in two parts."""
    with torch.device("meta"):
        made = networks(sizes)
    own = {name: {key: tuple(value.shape) for key, value in n.state_dict().items()} for name, n in made.items()}
    dino = {}
    for key, shape in own["dino"].items():
        for public, private in _DINO:
            key = key.replace(private, public)
        if ".up_proj." not in key:  # the lower half of the gate's rows
            dino[key.replace("gate_proj", "weights_in")] = (shape[0] * (1 + ("gate_proj" in key)), *shape[1:])
    adapter = {}
    for k, name in image_attentions(made["unet"]).items():
        inside = {key: shape for key, shape in own["unet"].items() if key.startswith(f"{name}.")}
        adapter |= {f"{k}{key.removeprefix(name)}": shape for key, shape in inside.items()}
    lora = {key.replace(".processor", ""): shape for key, shape in own["unet"].items() if _LORA.search(key)}
    lora |= {_IN_LORA + key: shape for key, shape in own["resampler"].items() if _LORA_RESAMPLER.search(key)}
    previewer = {}
    for key, (rows, columns, *kernel) in lora.items():
        module = key.removesuffix(".weight")
        # The saving path replaces these substrings, so the Resampler's to_q is spelt like the UNet's.
        down, up = _SPELLINGS[0 if re.search(r"to_[qkv]$|to_out\.0$", module) else 1]
        previewer[f"unet.{module}{down}"] = (sizes.rank, columns, *kernel)
        previewer[f"unet.{module}{up}"] = (rows, sizes.rank, *(1 for _ in kernel))
    return {
        "unet": {key: shape for key, shape in own["unet"].items() if ".processor." not in key},
        "vae": own["vae"],
        "text_encoder": {f"text_model.{key}": shape for key, shape in own["text_encoder"].items()},
        "text_encoder_2": own["text_encoder_2"],
        "dino": dino,
        "adapter": {"image_proj": own["resampler"], "ip_adapter": adapter},
        "aggregator": own["aggregator"],
        "previewer": previewer,
    }


def make_files(sizes: Sizes, seed: int) -> Files:
    """Random float32 weights under the published names, of a size that keeps activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def fill(shapes: dict[str, Any]) -> dict[str, Any]:
        return {key: fill(s) if isinstance(s, dict) else random(key, s) for key, s in shapes.items()}

    def random(key: str, shape: tuple[int, ...]) -> Tensor:
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            return 0.1 * value + float(key.endswith((".weight", ".lambda1")))
        # A LoRA's second half too: what the pair adds, divided by the rank, is then near the weight it changes.
        if key.endswith(("lora_B.weight", "lora.up.weight", "latents", "_token", "embedding.weight", "_embeddings")):
            return value
        # The scaling factor leaves trained latents at order one, so random ones come in as large as it expects.
        gain = {"quant_conv.weight": 1 / 0.13025, "post_quant_conv.weight": 0.13025}.get(key, 1.0)
        return value * gain / value[0].numel() ** 0.5

    return fill(file_shapes(sizes))


def lora_deltas(file: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a LoRA file adds to the weight of each module it names, kernels flattened."""
    deltas = {}
    for down, up in _SPELLINGS:
        for key in file:
            if key.endswith(down):
                module = key.removesuffix(down)
                a, b = file[key].flatten(1), file[module + up].flatten(1)
                alpha = float(file.get(f"{module}.alpha", 1.0))
                deltas[module.removeprefix("unet.")] = (b @ a) * (alpha / len(a))
    return deltas


def dino_table(table: Tensor, n: int, positions: str) -> Tensor:
    """DINOv2's position table [1,1+m*m,C] for n x n patches."""
    grid = table[:, 1:].transpose(1, 2)
    m = round(grid.shape[-1] ** 0.5)
    grid = grid.unflatten(-1, (m, m)).float()
    how: dict[str, Any] = {"release": {"scale_factor": ((n + 0.1) / m,) * 2}, "current": {"size": (n, n)}}[positions]
    grid = F.interpolate(grid, mode="bicubic", align_corners=False, **how)
    assert grid.shape[-2:] == (n, n)
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


class Reference:
    """The whole system from published files; every method is float32 and without gradients."""

    def __init__(self, files: Files, sizes: Sizes, dino_positions: str = "release") -> None:
        self.sizes = sizes
        made = networks(sizes)
        names = image_attentions(made["unet"])
        unet = dict(files["unet"])
        for key, value in files["adapter"]["ip_adapter"].items():
            k, rest = key.split(".", 1)
            unet[f"{names[int(k)]}.{rest}"] = value
        resampler = dict(files["adapter"]["image_proj"])
        preview_unet, preview_resampler = dict(unet), dict(resampler)
        for module, delta in lora_deltas(files["previewer"]).items():
            weights, name = preview_unet, re.sub(r"attn2\.((to|ln)_[kv]_ip)", r"attn2.processor.\1", module)
            if module.startswith(_IN_LORA):
                weights, name = preview_resampler, module.removeprefix(_IN_LORA)
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = weight + delta.view_as(weight)
        dino = {}
        for key, value in files["dino"].items():
            for public, private in _DINO:
                key = key.replace(public, private)
            if "weights_in" in key:
                dino[key.replace("weights_in", "gate_proj")], value = value.chunk(2)
            dino[key.replace("weights_in", "up_proj")] = value

        def loaded(network: Any, weights: dict[str, Tensor]) -> Any:
            network.load_state_dict(weights, strict=True)
            return network.eval().requires_grad_(False)

        self.unets = [loaded(copy.deepcopy(made["unet"]), w) for w in (unet, preview_unet)]
        self.resamplers = [loaded(copy.deepcopy(made["resampler"]), w) for w in (resampler, preview_resampler)]
        self.aggregator = loaded(made["aggregator"], files["aggregator"])
        self.vae = loaded(made["vae"], files["vae"])
        text = {key.removeprefix("text_model."): value for key, value in files["text_encoder"].items()}
        self.texts = [loaded(made["text_encoder"], text), loaded(made["text_encoder_2"], files["text_encoder_2"])]
        self.dino = loaded(made["dino"], dino)
        embeddings = self.dino.embeddings
        table = dino_table(embeddings.position_embeddings, sizes.dino_side // sizes.dino["patch_size"], dino_positions)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)

    def text(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        """The context [1,N,C] and the pooled text [1,P] of one prompt; both ids are [1,N]."""
        first, second = (model(i, output_hidden_states=True) for model, i in zip(self.texts, (ids, ids_2), strict=True))
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def features(self, pixels: Tensor) -> Tensor:
        """DINOv2's tokens [1,1+n*n,C] of normalised pixels [1,3,side,side]; all zeros is the unconditional image."""
        assert pixels.shape[-2:] == (self.sizes.dino_side,) * 2
        return self.dino(pixels).last_hidden_state

    def tokens(self, features: Tensor, preview: bool) -> Tensor:
        """The image tokens [1,queries,C] for the base UNet or the previewer."""
        return self.resamplers[preview](features)

    def time_ids(self, z: Tensor) -> Tensor:
        """(H, W, 0, 0, H, W) in pixels, one row per item of z."""
        h, w = (side * self.sizes.scale for side in z.shape[-2:])
        return torch.tensor([[h, w, 0, 0, h, w]], dtype=z.dtype).repeat(len(z), 1)

    def eps(
        self,
        z2: Tensor,
        t: Tensor,
        context2: Tensor,
        pooled2: Tensor,
        tokens2: Tensor,
        residuals: Residuals | None,
        preview: bool,
    ) -> Tensor:
        """The noise predicted by the base UNet or the previewer; the residuals are added as they are."""
        unet, time_ids = self.unets[preview], self.time_ids(z2)
        down, mid = residuals or (None, None)
        return unet(
            z2,
            t,
            encoder_hidden_states=context2,
            added_cond_kwargs={"text_embeds": pooled2, "time_ids": time_ids},
            cross_attention_kwargs={"temb": embedding(unet, t, pooled2, time_ids), "ip_hidden_states": tokens2},
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample

    def aggregate(self, y2: Tensor, t: Tensor, reference2: Tensor, pooled2: Tensor) -> Residuals:
        """The Aggregator's residuals at full strength."""
        return self.aggregator(y2, t, reference2, pooled2, self.time_ids(y2))

    def encode(self, image: Tensor) -> Tensor:
        """The latent [1,4,h,w] of an image [1,3,H,W] in [0,1]: the posterior's mean, scaled."""
        mean = self.vae.encode(2 * image - 1).latent_dist.mean
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> Tensor:
        """The image [1,3,H,W] in [0,1] of a latent."""
        z = z / self.vae.config.scaling_factor + (self.vae.config.shift_factor or 0)
        return (self.vae.decode(z).sample / 2 + 0.5).clamp(0, 1)

    def trajectory(
        self,
        y: Tensor,
        noise: Callable[[int], Tensor],
        *,
        context2: Tensor,
        pooled2: Tensor,
        tokens2: Tensor,
        preview_tokens2: Tensor,
        steps: int,
        guidance: float,
        sampler: str,
        adares: str,
        control_scale: float = 1.0,
        start: str = "lq",
    ) -> list[dict[str, Any]]:
        """Every step's z (after it), x0, preview, reference (None where skipped), delta and cond (both as used in it).

        Batches of two are unconditional, conditional; `ratio` is the unclamped delta that the step leaves behind.
        """
        scheduler = make_scheduler(sampler, steps, self.sizes.schedule)
        bound = {"off": 1.0, "paper": 1.0, "code": control_scale}[adares]
        first = scheduler.timesteps[:1]
        z = {"lq": lambda: scheduler.add_noise(y, noise(0), first), "noise": lambda: noise(0)}[start]()
        y2, preview2, delta = torch.cat([y, y]), torch.zeros_like(torch.cat([y, y])), min(1.0, bound)
        kept = []
        for i, t in enumerate(scheduler.timesteps):
            z2 = torch.cat([z, z])
            cond = delta if adares == "code" else min(1.0, control_scale)
            last, reference2, residuals = preview2[1:], None, None
            if cond > 0.1:
                eps2 = self.eps(z2, t, context2, pooled2, preview_tokens2, None, preview=True)
                preview2 = consistency(eps2, t, z2, scheduler.alphas_cumprod)
                reference2 = preview2 + delta * (y2 - preview2) if adares == "paper" else preview2
                down, mid = self.aggregate(y2, t, reference2, pooled2)
                residuals = [cond * r for r in down], cond * mid
            without, with_ = self.eps(z2, t, context2, pooled2, tokens2, residuals, preview=False).chunk(2)
            eps = without + guidance * (with_ - without)
            with patch("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, i=i, **__: noise(1 + i)):
                stepped = scheduler.step(eps, t, z)
            z, x0 = stepped.prev_sample, stepped.pred_original_sample
            moved = (preview2[1:] - last).square().sum().clamp(min=1e-12)
            ratio = ((preview2[1:] - x0).square().sum() / moved).item()
            kept.append(
                {
                    "z": z,
                    "x0": x0,
                    "preview": preview2[1:],
                    "reference": None if reference2 is None else reference2[1:],
                    "delta": delta,
                    "cond": cond,
                    "ratio": ratio,
                }
            )
            delta = 1.0 if adares == "off" else min(ratio, bound)
        return kept


def make_scheduler(sampler: str, steps: int, schedule: dict[str, Any] | None = None) -> DDIMScheduler | DDPMScheduler:
    """diffusers' scheduler "ddim" (eta 0) or "ddpm", its timesteps set."""
    scheduler = SAMPLERS[sampler].from_config(SCHEDULE if schedule is None else schedule)
    scheduler.set_timesteps(steps)
    return scheduler


def consistency(eps: Tensor, t: Tensor, z: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """One step of the latent consistency model."""
    alpha, beta = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
    s = 10.0 * float(t)
    c_skip, c_out = 0.25 / (s**2 + 0.25), s / (s**2 + 0.25) ** 0.5
    return c_out * (z - beta * eps) / alpha + c_skip * z
