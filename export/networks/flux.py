"""FLUX.1-Fill for restoration: one sampling step, and the modulation that depends on time and text only.

The modulation of a step is 344 vectors at full size. `Modulate` computes them for all steps at once, so the step needs
no weights for timestep and pooled text. The degraded image enters by channels, not by tokens. The mask channels are
constant, so their share of the embedding is a bias.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tilewright.export.networks.low_rank import Branches, LowRank, Strength, add_branches, terms
from tilewright.export.networks.sinusoid import Sinusoid
from tilewright.kernels.concat_project import concat_project
from tilewright.kernels.joint_attention import joint_attention
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope

__all__ = ["Modulate", "Step"]

ROPE_THETA = 10_000
SINUSOID = 256  # width of a timestep's embedding


class _Halves(nn.Module):
    """The last modulation as two linear layers, because published layouts differ in the order of its halves."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.scale(x), self.shift(x)), -1)


class _Flux(nn.Module):
    """The transformer of diffusers with the low-rank branches of a LoRA."""

    def __init__(self, config: Mapping[str, Any], branches: Branches | None) -> None:
        super().__init__()
        transformer: Any = FluxTransformer2DModel(**config)
        dim = transformer.inner_dim
        transformer.norm_out.linear = _Halves(dim)
        transformer.time_text_embed.time_proj = Sinusoid(SINUSOID)
        self.transformer: Any = transformer
        self.strength = Strength()
        add_branches(transformer, branches or {}, self.strength, _halves)

    def modulation(self, sigmas: Tensor, guidance: Tensor, pooled: Tensor, *, exact: bool) -> Tensor:
        """All modulation vectors [B, S, rows, dim] for sigmas [B, S], guidance [B] and pooled texts [B, D]."""
        model: Any = self.transformer
        t, g = _scalars(sigmas, guidance, exact)
        embed = model.time_text_embed
        time = embed.timestep_embedder(embed.time_proj(t)) + embed.guidance_embedder(embed.time_proj(g))[:, None]
        temb = F.silu(time + embed.text_embedder(pooled)[:, None])  # [B, S, dim]
        double = [linear for b in model.transformer_blocks for linear in (b.norm1.linear, b.norm1_context.linear)]
        linears = [*double, *(b.norm.linear for b in model.single_transformer_blocks), model.norm_out.linear]
        dim = temb.shape[-1]
        vectors = [linear(temb) for linear in linears]
        return torch.cat([v.reshape(-1, sigmas.shape[1], v.shape[2] // dim, dim) for v in vectors], 2)


def _halves(path: str) -> list[str]:
    return [f"{path}.scale", f"{path}.shift"] if path == "norm_out.linear" else [path]


def _scalars(sigmas: Tensor, guidance: Tensor, exact: bool) -> tuple[Tensor, Tensor]:
    """Timestep and guidance for the sinusoids, exact or rounded as a pipeline in bfloat16 rounds them."""
    if exact:
        return sigmas * 1000, guidance * 1000

    def rounded(x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).float()

    return rounded(rounded(rounded(rounded(sigmas * 1000) / 1000)) * 1000), rounded(rounded(guidance) * 1000)


class Modulate(_Flux):
    """The modulation of every step [B, S, rows, dim]."""

    def __init__(self, config: Mapping[str, Any], *, exact: bool = True, branches: Branches | None = None) -> None:
        super().__init__(config, branches)
        self.exact = exact
        model: Any = self.transformer
        for block in [*model.transformer_blocks, *model.single_transformer_blocks]:
            for name, _ in list(block.named_children()):
                if name not in ("norm", "norm1", "norm1_context"):
                    delattr(block, name)
        for name in ("x_embedder", "context_embedder", "proj_out"):
            delattr(model, name)

    def forward(
        self,
        pooled: Tensor,
        guidance: Tensor,
        sigmas: Tensor,
        bridge: Tensor | None = None,
        lora_scale: Tensor | None = None,
    ) -> Tensor:
        """`bridge` is added to the pooled text and depends on the image."""
        self.strength.value = 1.0 if lora_scale is None else lora_scale
        return self.modulation(sigmas, guidance, pooled if bridge is None else pooled + bridge, exact=self.exact)


class Step(_Flux):
    """One Euler step in float32: z + (sigma_next - sigma) v(z, y, context)."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        diptych: bool = False,  # left half: degraded image, mask 0; right half: restored image, mask 1
        mask: float = 0.0,  # the mask of every token if the canvas is no diptych
        split: bool = True,  # the modulation is an input
        exact: bool = True,  # timestep and guidance are not rounded
        branches: Branches | None = None,
    ) -> None:
        super().__init__(config, branches)
        self.diptych, self.mask, self.exact = diptych, mask, exact
        model: Any = self.transformer
        self.latent = int(config["out_channels"])
        self.heads, self.width = int(config["num_attention_heads"]), int(config["attention_head_dim"])
        self.still = int(config["axes_dims_rope"][0]) // 2  # pairs of channels that no position rotates
        self.per_row: Tensor
        self.per_column: Tensor
        for axis, dim in zip(("row", "column"), config["axes_dims_rope"][1:], strict=True):
            exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
            self.register_buffer(f"per_{axis}", (ROPE_THETA**-exponents).float(), persistent=False)
        if split:
            for norm in self._norms():
                del norm.linear
            del model.time_text_embed

    def _norms(self) -> list[Any]:
        model: Any = self.transformer
        double = [norm for b in model.transformer_blocks for norm in (b.norm1, b.norm1_context)]
        return [*double, *(b.norm for b in model.single_transformer_blocks), model.norm_out]

    def forward(
        self,
        z: Tensor,
        y: Tensor,
        context: Tensor,
        sigma: Tensor,
        sigma_next: Tensor,
        seen: Tensor | None = None,
        modulation: Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: Tensor | None = None,
        bridge: Tensor | None = None,
        lora_scale: Tensor | None = None,
    ) -> Tensor:
        """The next z. `seen` are image tokens behind the text's; without `modulation` it is computed here."""
        self.strength.value = 1.0 if lora_scale is None else lora_scale
        if modulation is None:
            assert pooled is not None and guidance is not None
            pooled = pooled if bridge is None else pooled + bridge
            modulation = self.modulation(sigma[:, None], guidance, pooled, exact=self.exact)[:, 0]
        velocity = self.velocity(z, y, self._text(context, seen, z.shape[0]), list(modulation.split(1, 1)))
        return z + (sigma_next - sigma)[..., None, None, None] * velocity

    def _text(self, context: Tensor, seen: Tensor | None, batch: int) -> Tensor:
        """The embedded text tokens [B, T, D]. A prompt that all tiles share is embedded once."""
        model: Any = self.transformer
        text = model.context_embedder(context).expand(batch, -1, -1)
        return text if seen is None else torch.cat((text, model.context_embedder(seen)), 1)

    def velocity(self, z: Tensor, y: Tensor, text: Tensor, rows: list[Tensor]) -> Tensor:
        """The velocity that the transformer predicts, as a latent [B, C, h, w]."""
        model: Any = self.transformer
        height, width = z.shape[2] // 2, z.shape[3] // 2
        x = self._embed(z, y, height, width)
        length = text.shape[1]
        turn = self._rotation(height, width)
        rows = rows[::-1]
        for block in model.transformer_blocks:
            x, text = self._double(block, x, text, [rows.pop() for _ in range(12)], turn)
        joint = torch.cat((text, x), 1)
        for block in model.single_transformer_blocks:
            joint = self._single(block, joint, [rows.pop() for _ in range(3)], turn)
        scale, shift = rows.pop(), rows.pop()
        x = model.proj_out(model.norm_out.norm(joint[:, length:]) * (1 + scale) + shift)
        return F.pixel_shuffle(x.transpose(1, 2).unflatten(2, (height, width)), 2)

    def _embed(self, z: Tensor, y: Tensor, height: int, width: int) -> Tensor:
        """Embed both latents, joined by channels, with the embedder's columns for them; the mask becomes a bias."""
        linear: Any = self.transformer.x_embedder
        noisy, condition = (F.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2) for latent in (z, y))
        joined = 2 * self.latent
        term, mask = linear.bias, linear.weight[:, joined:].sum(1)
        if isinstance(linear, LowRank):
            low = concat_project(noisy, condition, linear.lora_A, linear.lora_A.new_zeros(len(linear.lora_A)))
            term = term + linear.raised(low)
            mask = mask + linear.raised(linear.lora_A[:, joined:].sum(1)[None, None])
        if self.diptych:
            right = (torch.arange(width) >= width // 2).to(z.dtype)
            term = term + right.expand(height, -1).reshape(1, -1, 1) * mask
        elif self.mask:
            term = term + self.mask * mask
        return concat_project(noisy, condition, linear.weight, term)

    def _rotation(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines [N, width / 2] of the image tokens' rows and columns; text tokens are not rotated."""
        by_row = torch.arange(height, dtype=torch.float32)[:, None] * self.per_row
        by_column = torch.arange(width, dtype=torch.float32)[:, None] * self.per_column
        angles = (
            torch.zeros(height, width, self.still),
            by_row[:, None].expand(-1, width, -1),
            by_column[None].expand(height, -1, -1),
        )
        joined = torch.cat(angles, 2).flatten(0, 1)
        return joined.cos(), joined.sin()

    def _double(
        self, block: Any, x: Tensor, text: Tensor, rows: list[Tensor], turn: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        attn = block.attn
        image, words = rows[:6], rows[6:]
        a = block.norm1.norm(x) * (1 + image[1]) + image[0]
        b = block.norm1_context.norm(text) * (1 + words[1]) + words[0]
        words_qkv = self._qkv(
            b, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        )
        image_qkv = self._qkv(a, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), turn)
        attended_text, attended = joint_attention(*words_qkv, *image_qkv)
        x = x + image[2] * attn.to_out[0](attended)
        text = text + words[2] * attn.to_add_out(attended_text)
        x = x + image[5] * block.ff(block.norm2(x) * (1 + image[4]) + image[3])
        text = text + words[5] * block.ff_context(block.norm2_context(text) * (1 + words[4]) + words[3])
        return x, text

    def _single(self, block: Any, joint: Tensor, rows: list[Tensor], turn: tuple[Tensor, Tensor]) -> Tensor:
        attn = block.attn
        a = block.norm.norm(joint) * (1 + rows[1]) + rows[0]
        q, k, v = self._qkv(a, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), turn)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return joint + rows[2] * block.proj_out(torch.cat((attended, block.act_mlp(block.proj_mlp(a))), 2))

    def _qkv(
        self, x: Tensor, linears: tuple[Any, ...], norms: tuple[Any, Any], turn: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normed queries and keys, and values [B, H, N, D]. The tables rotate the last tokens."""
        weights, scales = (linear.weight for linear in linears), (norm.weight for norm in norms)
        arguments = (x, None, *weights, *terms(linears, x), *scales, *turn)
        return qkv_norm_rope(*arguments, heads=self.heads, epsilon=norms[0].eps, interleaved=True)
