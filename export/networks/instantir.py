"""InstantIR: SDXL's UNet with time-aware image attention, the aggregator that steers it, and the sampler's step.

The same UNet is the previewer, with a low-rank branch, and the base, without it. So its graph ends at the predicted
noise. Preview, AdaRes, guidance and sampler follow in `Aggregate` and `Step`; the sampler has no weights. Every call
computes both halves of classifier-free guidance: [tile, without | with the prompt, ...]. Keys and values of words and
of image tokens are the same in every step. They are one input for all layers: key, value of the first layer, key,
value of the second, ...
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from tilewright.export.networks.low_rank import Branches, Strength, Zero, add_branches
from tilewright.export.networks.sinusoid import Sinusoid

__all__ = ["Aggregate", "Gates", "Look", "Resampler", "Start", "Step", "Text", "Unet", "Words"]

SIGMA_DATA, TIME_SCALE = 0.5, 10.0  # constants of the previewer, which is a consistency model
LEAST_STRENGTH = 0.1  # residuals weaker than this are left out
LEAST_CHANGE = 1e-12  # guards AdaRes against a preview that did not move
SAME_STEP = 1e-3  # tolerance in steps: in float32, unlike in the release, 0.6 of 50 steps is above 30
OFF, PAPER, CODE = range(3)  # AdaRes: none, as in the paper, as in the released code


class Text(nn.Module):
    """SDXL's context [B, N, C] and pooled text [B, P] of the ids [B, N] of both tokenizers."""

    def __init__(self, text: dict[str, Any], text_2: dict[str, Any]) -> None:
        super().__init__()
        # with 2, the end's id in published files, the library pools at the highest id of a text
        self.text: Any = CLIPTextModel(CLIPTextConfig(**text | {"eos_token_id": 2}))
        del self.text.encoder.layers[-1]  # the context is the input of the last layer
        self.text.add_module("final_layer_norm", nn.Identity())
        self.text_2 = CLIPTextModelWithProjection(CLIPTextConfig(**text_2 | {"eos_token_id": 2}))

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        one = self.text(ids).last_hidden_state
        other = self.text_2(ids_2, output_hidden_states=True)
        return torch.cat((one, other.hidden_states[-2]), 2), other.text_embeds


class Start(nn.Module):
    """The first latent of the sampler."""

    def forward(self, latent: Tensor, noise: Tensor, alpha: Tensor, beta: Tensor, start: Tensor) -> Tensor:
        """`start` 0: the image's latent with noise; 1: noise alone. `alpha` and `beta` are those of all steps."""
        alpha, beta, start = (x[..., None, None, None] for x in (alpha[:, 0], beta[:, 0], start))
        return torch.where(start == 0, alpha * latent + beta * noise, noise)


def _blocks(unet: Any) -> dict[int, tuple[str, Any]]:
    """The release's number of each cross-attention -> the path of its transformer block, and the block."""
    parts = [*(f"down_blocks.{i}" for i in range(len(unet.down_blocks)))]
    parts += [*(f"up_blocks.{i}" for i in range(len(unet.up_blocks))), "mid_block"]
    blocks = [
        (f"{part}.{name}", module)
        for part in parts
        for name, module in unet.get_submodule(part).named_modules()
        if isinstance(module, BasicTransformerBlock)
    ]
    return {2 * i + 1: pair for i, pair in enumerate(blocks)}  # even numbers are self-attentions


def _prune(unet: Any, keep: Callable[[str], bool]) -> None:
    """Delete the modules with weights, except those that `keep` accepts."""
    for name, module in list(unet.named_modules()):
        if module._parameters and not keep(name):
            parent, _, child = name.rpartition(".")
            delattr(unet.get_submodule(parent), child)


class Words(nn.Module):
    """Keys and values of all layers [B, 2, N, K] for two contexts [B, N, C]."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.unet: Any = UNet2DConditionModel(**config)
        _prune(self.unet, lambda name: name.endswith((".attn2.to_k", ".attn2.to_v")))

    def forward(self, context: Tensor, negative_context: Tensor) -> Tensor:
        both = torch.stack((negative_context, context), 1)
        blocks = [block for _, block in _blocks(self.unet).values()]
        return torch.cat([linear(both) for b in blocks for linear in (b.attn2.to_k, b.attn2.to_v)], 3)


class _Perceiver(nn.Module):
    """Attention of the resampler's latents to image tokens and to themselves."""

    def __init__(self, dim: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        inner = heads * head_width
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_kv = nn.Linear(dim, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, image: Tensor, latents: Tensor) -> Tensor:
        image, latents = self.norm1(image), self.norm2(latents)
        key, value = self.to_kv(torch.cat((image, latents), 1)).chunk(2, 2)
        return self.to_out(_attend(self.to_q(latents), key, value, self.heads))


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    split = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2)


class Resampler(nn.Module):
    """Turns image tokens [B, N, in] into a few tokens [B, queries, out]."""

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
            forward = nn.Sequential(nn.LayerNorm(dim), up, nn.GELU(), down)
            self.layers.append(nn.ModuleList([_Perceiver(dim, heads, head_width), forward]))

    def forward(self, features: Tensor) -> Tensor:
        image, latents = self.proj_in(features), self.latents.expand(features.shape[0], -1, -1)
        for pair in self.layers:
            attention, forward = pair.children()
            latents = latents + attention(image, latents)
            latents = latents + forward(latents)
        return self.norm_out(self.proj_out(latents))


class _ImageKeys(nn.Module):
    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(width_in, width, bias=False)
        self.to_v_ip = nn.Linear(width_in, width, bias=False)


class Look(nn.Module):
    """Normed keys and values of all layers [B, 2, tokens, K], for an empty image's features and the image's."""

    def __init__(
        self, config: Mapping[str, Any], resampler: Mapping[str, int], branches: Branches | None = None
    ) -> None:
        super().__init__()
        self.resampler = Resampler(**resampler)
        self.unet: Any = UNet2DConditionModel(**config)
        self.numbers = list(_blocks(self.unet))
        for number, (_, block) in _blocks(self.unet).items():
            keys = _ImageKeys(resampler["width_out"], block.attn2.to_q.out_features)
            block.attn2.add_module(f"processor_{number}", keys)
        self.strength = Strength()
        _prune(self.unet, lambda name: ".processor_" in name)
        add_branches(self, branches or {}, self.strength, _placing(self.unet, "unet."))

    def forward(self, features: Tensor, nothing: Tensor, lora_scale: Tensor | None = None) -> Tensor:
        self.strength.value = _strength(lora_scale, features.shape[0])
        both = torch.stack((nothing.expand(features.shape[0], -1, -1), features), 1).flatten(0, 1)
        tokens = self.resampler(both)
        keys = [getattr(block.attn2, f"processor_{n}") for n, (_, block) in _blocks(self.unet).items()]
        normed = [F.layer_norm(y, y.shape[2:], eps=1e-6) for k in keys for y in (k.to_k_ip(tokens), k.to_v_ip(tokens))]
        return torch.cat(normed, 2).unflatten(0, (-1, 2))


RESAMPLER = "encoder_hid_proj.image_projection_layers.0."  # its prefix in the previewer's file


def _placing(unet: Any, prefix: str = "") -> Callable[[str], list[str]]:
    """A function from a module's path in the previewer's file to its paths in our network."""
    numbers = {path: number for number, (path, _) in _blocks(unet).items()}

    def place(path: str) -> list[str]:
        if path.startswith(RESAMPLER):
            return [f"resampler.{path.removeprefix(RESAMPLER)}"]
        block, attention, inner = path.partition(".attn2.")
        if attention and "_ip" in inner and block in numbers:
            return [f"{prefix}{block}.attn2.processor_{numbers[block]}.{inner}"]
        return [prefix + path]

    return place


@dataclass
class _Shared:
    """Tensors that all layers of one forward share; not a module, so that tracing may set it."""

    words: list[Tensor] = field(default_factory=list)
    image_tokens: list[Tensor] = field(default_factory=list)
    active: Tensor | None = None  # the activated time embedding


class _AdaptiveNorm(nn.Module):
    """Shift and scale that depend on time, for values that are normed already."""

    def __init__(self, time_width: int, width: int, *, adaptive: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(time_width, 2 * width) if adaptive else Zero(time_width, 2 * width)

    def forward(self, normed: Tensor, active: Tensor) -> Tensor:
        shift, scale = self.linear(active)[:, None].chunk(2, 2)
        return normed * (1 + scale) + shift


class _TimeAware(nn.Module):
    """Cross-attention to the words, plus attention to image tokens with keys and values that depend on time."""

    def __init__(
        self, attn: Any, number: int, position: int, time_width: int, shared: _Shared, *, adaptive: bool
    ) -> None:
        super().__init__()
        width = attn.to_q.out_features
        self.heads, self.position, self.number, self.shared = attn.heads, 2 * position, number, shared
        self.to_q, self.to_out = attn.to_q, attn.to_out
        norms = {name: _AdaptiveNorm(time_width, width, adaptive=adaptive) for name in ("ln_k_ip", "ln_v_ip")}
        self.add_module(f"processor_{number}", nn.ModuleDict(norms))

    def forward(self, x: Tensor, encoder_hidden_states: None = None, attention_mask: None = None) -> Tensor:
        shared, at = self.shared, self.position
        query = self.to_q(x)
        text = _attend(query, shared.words[at], shared.words[at + 1], self.heads)
        key, value = shared.image_tokens[at], shared.image_tokens[at + 1]
        norms: Any = self.get_submodule(f"processor_{self.number}")
        key, value = norms["ln_k_ip"](key, shared.active), norms["ln_v_ip"](value, shared.active)
        return self.to_out[0](text + _attend(query, key, value, self.heads))


def _time(model: Any, t: Tensor, latent: Tensor, spatial: int, pooled: Tensor, negative_pooled: Tensor) -> Tensor:
    """SDXL's time embedding for both halves of guidance [2 * B, D]; it includes the latent's size in pixels."""
    batch = latent.shape[0]
    sides = [latent.new_ones(1) * (side * spatial) for side in latent.shape[2:]]
    sizes = torch.cat((*sides, latent.new_zeros(2), *sides))
    size_embedding = model.add_time_proj(sizes).flatten()[None, None].expand(batch, 2, -1)
    texts = torch.stack([text.expand(batch, -1) for text in (negative_pooled, pooled)], 1)
    added = model.add_embedding(torch.cat((texts, size_embedding), 2))
    return (model.time_embedding(model.time_proj(t))[:, None] + added).flatten(0, 1)


def _strength(lora_scale: Tensor | None, batch: int) -> Tensor | float:
    """The strength of the branches for both halves of guidance [2 * B]."""
    return 1.0 if lora_scale is None else lora_scale[:, None].expand(batch, 2).flatten()


def _set_sinusoids(model: Any, config: Mapping[str, Any]) -> None:
    model.time_proj = Sinusoid(config["block_out_channels"][0])
    model.add_time_proj = Sinusoid(config["addition_time_embed_dim"])


class Unet(nn.Module):
    """Predicts the noise [B, 2, 4, h, w] of a latent [B, 4, h, w]."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        spatial: int,
        adaptive: bool = True,  # the adapter has weights for norms that depend on time
        branches: Branches | None = None,
    ) -> None:
        super().__init__()
        unet: Any = UNet2DConditionModel(**config)
        self.unet, self.spatial, self.shared, self.strength = unet, spatial, _Shared(), Strength()
        _set_sinusoids(unet, config)
        width = unet.time_embedding.linear_2.out_features
        placing = _placing(unet)
        self.sizes = []
        for position, (number, (_, block)) in enumerate(_blocks(unet).items()):
            self.sizes += 2 * [block.attn2.to_q.out_features]
            block.attn2 = _TimeAware(block.attn2, number, position, width, self.shared, adaptive=adaptive)
        add_branches(unet, branches or {}, self.strength, placing)

    def forward(
        self,
        z: Tensor,
        words: Tensor,
        seen: Tensor,
        pooled: Tensor,
        negative_pooled: Tensor,
        t: Tensor,
        lora_scale: Tensor | None = None,
        control: Tensor | None = None,
        mid: Tensor | None = None,
        r0: Tensor | None = None,
        r1: Tensor | None = None,
        r2: Tensor | None = None,
        r3: Tensor | None = None,
        r4: Tensor | None = None,
        r5: Tensor | None = None,
        r6: Tensor | None = None,
        r7: Tensor | None = None,
        r8: Tensor | None = None,
    ) -> Tensor:
        """The residuals r0 to r8 and `mid` [B, 2, C, h, w] are added to the skips, times `control` [B, 1]."""
        unet, batch = self.unet, z.shape[0]
        self.strength.value = _strength(lora_scale, batch)
        temb = _time(unet, t, z, self.spatial, pooled, negative_pooled)
        self.shared.active = F.silu(temb)
        # sliced before they are repeated, so that only one layer's are in memory twice
        self.shared.words = [part.expand(batch, -1, -1, -1).flatten(0, 1) for part in self._layers(words)]
        self.shared.image_tokens = [part.flatten(0, 1) for part in self._layers(seen)]
        x = unet.conv_in(z[:, None].expand(-1, 2, -1, -1, -1).flatten(0, 1))
        skips = [x]
        for block in unet.down_blocks:
            x, outputs = block(x, temb)
            skips += outputs
        x = unet.mid_block(x, temb)
        if control is not None and mid is not None:
            factor = control[:, :, None, None, None]
            added = [r for r in (r0, r1, r2, r3, r4, r5, r6, r7, r8) if r is not None]
            skips = [s + (r * factor).flatten(0, 1) for s, r in zip(skips, added, strict=True)]
            x = x + (mid * factor).flatten(0, 1)
        for block in unet.up_blocks:
            count = len(block.resnets)
            skips, joined = skips[:-count], skips[-count:]
            x = block(x, tuple(joined), temb)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(x))).unflatten(0, (-1, 2))

    def _layers(self, joined: Tensor) -> list[Tensor]:
        """The keys and values of each layer, as slices: the exporter would turn a split into a sequence."""
        ends = list(accumulate(self.sizes))
        return [joined[..., end - size : end] for size, end in zip(self.sizes, ends, strict=True)]


class _Sft(nn.Module):
    """Scales and shifts the lower half, cell by cell, with numbers computed from the upper half."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.mlp_shared = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.SiLU())
        self.mul = nn.Conv2d(hidden, channels, 3, padding=1)
        self.add = nn.Conv2d(hidden, channels, 3, padding=1)

    def forward(self, upper: Tensor, lower: Tensor) -> Tensor:
        shared = self.mlp_shared(upper)
        return lower * (1 + self.mul(shared)) + self.add(shared)


class _Head(nn.Sequential):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__(_Sft(channels, hidden), nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        middle = x.shape[2] // 2
        return self[1](self[0](x[:, :, :middle], x[:, :, middle:]))


class Aggregate(nn.Module):
    """Makes the preview of the result, and from preview and image the residuals for the UNet's skips."""

    def __init__(self, config: Mapping[str, Any], *, spatial: int, hidden: int) -> None:
        super().__init__()
        unet: Any = UNet2DConditionModel(**config)
        self.spatial = spatial
        _set_sinusoids(self, config)
        self.time_embedding, self.add_embedding = unet.time_embedding, unet.add_embedding
        self.conv_in = unet.conv_in
        first = config["block_out_channels"][0]
        self.ref_conv_in = nn.Conv2d(config["in_channels"], first, 3, padding=1)
        self.down_blocks, self.mid_block = unet.down_blocks, unet.mid_block
        for _, block in _blocks(unet).values():
            block.attn2 = block.norm2 = None
        widths = [first]
        for block in self.down_blocks:
            widths += [resnet.out_channels for resnet in block.resnets]
            widths += [block.resnets[-1].out_channels] if block.downsamplers else []
        self.controlnet_down_blocks = nn.ModuleList([_Head(width, hidden) for width in widths])
        self.controlnet_mid_block = _Head(config["block_out_channels"][-1], hidden)

    def forward(
        self,
        z: Tensor,
        y: Tensor,
        noise: Tensor,
        preview: Tensor,
        delta: Tensor,
        pooled: Tensor,
        negative_pooled: Tensor,
        t: Tensor,
        alpha: Tensor,
        beta: Tensor,
        adares: Tensor,
        control_scale: Tensor,
        control_on: Tensor,
        preview_on: Tensor,
    ) -> tuple[Tensor, ...]:
        """Preview with the prompt, how far it moved, strength, middle and skips. `noise` is the previewer's."""
        time, alpha, beta = (x[..., None, None, None, None] for x in (t, alpha, beta))
        scaled = TIME_SCALE * time
        spread = scaled * scaled + SIGMA_DATA * SIGMA_DATA
        keep, change = SIGMA_DATA * SIGMA_DATA / spread, scaled / spread.sqrt()
        noisy = z[:, None]
        previews = change * (noisy - beta * noise) / alpha + keep * noisy
        latent = y[:, None].expand(-1, 2, -1, -1, -1)
        previews = torch.where(preview_on[..., None, None, None] > 0, previews, latent)
        one = torch.ones_like(delta)
        adares, control_scale = adares[:, None], control_scale[:, None]
        mix = torch.where(adares == PAPER, delta.clamp(0, 1), 0 * one)[:, :, None, None, None]
        strength = torch.minimum(torch.where(adares == CODE, delta, one), control_scale).clamp(min=0) * control_on
        on = strength > LEAST_STRENGTH
        middle, skips = self.residuals(latent, previews + mix * (latent - previews), t, pooled, negative_pooled)
        new_preview = torch.where(on[:, :, None, None], previews[:, 1], preview)
        moved = (new_preview - preview).square().sum((1, 2, 3))[:, None]
        return new_preview, moved, torch.where(on, strength, 0 * one), middle, *skips

    def residuals(
        self, latent: Tensor, reference: Tensor, t: Tensor, pooled: Tensor, negative_pooled: Tensor
    ) -> tuple[Tensor, list[Tensor]]:
        """Residuals of both halves of guidance, from the image's latent stacked upon the preview's [B, 2, 4, h, w]."""
        temb = _time(self, t, latent[:, 0], self.spatial, pooled, negative_pooled)
        x = torch.cat((self.conv_in(latent.flatten(0, 1)), self.ref_conv_in(reference.flatten(0, 1))), 2)
        states = [x]
        for block in self.down_blocks:
            x, outputs = block(x, temb)
            states += outputs
        x = self.controlnet_mid_block(self.mid_block(x, temb))
        skips = [head(m).unflatten(0, (-1, 2)) for head, m in zip(self.controlnet_down_blocks, states, strict=True)]
        return x.unflatten(0, (-1, 2)), skips


class Gates(nn.Module):
    """For every step, two flags [B, steps, 1]: whether residuals are added, whether a preview is made."""

    def forward(
        self,
        t: Tensor,
        control_start: Tensor,
        control_end: Tensor,
        preview_start: Tensor,
        preview_end: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """1 for steps that lie within [start, end], as shares of all steps, else 0."""
        count = t.shape[1]
        before = torch.arange(count, dtype=torch.float32)[None, :, None]
        shares = (share[:, None, None] for share in (control_start, control_end, preview_start, preview_end))
        spans = zip(shares, shares, strict=True)
        control, preview = (
            ((before >= s * count - SAME_STEP) & (before + 1 <= e * count + SAME_STEP)).float() for s, e in spans
        )
        return control, preview


class Step(nn.Module):
    """Guidance, one step of the sampler in float32, and the error of the preview, which AdaRes reads."""

    def __init__(self, offset: int) -> None:
        super().__init__()
        self.offset = offset  # time of the last step

    def forward(
        self,
        z: Tensor,
        predicted: Tensor,
        preview: Tensor,
        moved: Tensor,
        noise: Tensor,
        guidance: Tensor,
        sampler: Tensor,
        t: Tensor,
        alpha: Tensor,
        beta: Tensor,
        alpha_next: Tensor,
        beta_next: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The next latent [B, 4, h, w] by DDIM (`sampler` 0) or DDPM (1), and delta [B, 1]."""
        t, alpha, beta = (x[..., None, None, None] for x in (t, alpha, beta))
        alpha_next, beta_next = alpha_next[..., None, None, None], beta_next[..., None, None, None]
        guidance, sampler = guidance[..., None, None, None], sampler[..., None, None, None]
        without, with_words = predicted.unbind(1)
        eps = without + guidance * (with_words - without)
        x0 = (z - beta * eps) / alpha
        deterministic = alpha_next * x0 + beta_next * eps
        last = t < self.offset + 0.5
        clean, noisy = torch.where(last, 1.0, alpha_next), torch.where(last, 0.0, beta_next)
        # both formulas give the same number, but each loses digits where its own numbers are close to 1
        risen = torch.where(alpha > beta, (beta - noisy) * (beta + noisy), (clean - alpha) * (clean + alpha))
        risen = risen / (clean * clean)
        ancestral = clean * risen / (beta * beta) * x0 + alpha / clean * (noisy / beta) * (noisy / beta) * z
        ancestral = ancestral + noisy / beta * risen.sqrt() * noise
        off = (preview - x0).square().sum((1, 2, 3))[:, None]
        return torch.where(sampler == 0, deterministic, ancestral), off / moved.clamp(min=LEAST_CHANGE)
