"""TokSR: the text encoder, the tokenizer's encoder and decoder, and one sampling step on its tokens.

The tokenizer's parameters have the names of TA-TiTok's files. Text and timestep are often the same for all tiles, and
then have a batch of 1. Work that depends on them alone is done before their result is repeated for every tile.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilewright.export.networks.hitoksr import unpatch
from tilewright.export.networks.text import ClipText

__all__ = ["Detokenise", "Step", "Text", "Tokenise"]

SINUSOID = 256  # width of a timestep's embedding
ALL = slice(None)


class Text(nn.Module):
    """Normed hidden states of the words [B, N, D], and the one at the text's end [B, D], which has the highest id."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = ClipText(config).model

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(ids)
        return out.last_hidden_state, out.pooler_output


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))  # [B, heads, rows, width]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _Attention(nn.Module):
    """Self-attention with the parameters of torch.nn.MultiheadAttention, for the queries in `rows` only."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        query, key, value = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, 2)
        return self.out_proj(_attend(query[:, rows], key, value, self.heads))


class _Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class _Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), _Attention(width, heads)
        self.ln_2, self.mlp = nn.LayerNorm(width), _Mlp(width)

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        x = x[:, rows] + self.attn(self.ln_1(x), rows)
        return x + self.mlp(self.ln_2(x))


class _Half(nn.Module):
    """The base of the tokenizer's encoder and decoder, over the sequence [class, patches, latents, text]."""

    def __init__(self, sizes: Mapping[str, Any], half: Mapping[str, Any], *, text: bool) -> None:
        super().__init__()
        width, self.grid = half["width"], sizes["image"] // sizes["patch"]
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + self.grid**2, width))
        self.latent_token_positional_embedding = nn.Parameter(torch.empty(sizes["latents"], width))
        if text:
            self.text_guidance_proj = nn.Linear(sizes["text_width"], width)
            self.text_guidance_positional_embedding = nn.Parameter(torch.empty(sizes["words"], width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = nn.ModuleList(_Block(width, half["heads"]) for _ in range(half["layers"]))
        self.ln_post = nn.LayerNorm(width)

    def guidance(self, words: Tensor) -> Tensor:
        """The text tokens of the sequence."""
        return self.text_guidance_proj(words) + self.text_guidance_positional_embedding

    def transformed(self, parts: Sequence[Tensor], batch: int, rows: slice) -> Tensor:
        """Transform the joined parts [B or 1, n, D] and return `rows` of the result."""
        x = self.ln_pre(torch.cat([part.expand(batch, -1, -1) for part in parts], 1))
        *blocks, last = self.transformer
        for block in blocks:
            x = block(x, ALL)
        return self.ln_post(last(x, rows))


class _Encoder(_Half):
    """Encodes an image into latent tokens: their mean and log variance [B, latents, 2 * token]."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        half = sizes["encoder"]
        super().__init__(sizes, half, text=half["text"])
        self.patch_embed = nn.Conv2d(3, half["width"], sizes["patch"], sizes["patch"])
        self.conv_out = nn.Conv2d(half["width"], 2 * sizes["token"], 1)

    def forward(self, image: Tensor, latent_tokens: Tensor, words: Tensor | None) -> Tensor:
        patches = self.patch_embed(image).flatten(2).transpose(1, 2) + self.positional_embedding[1:]
        latents = (latent_tokens + self.latent_token_positional_embedding)[None]
        start = 1 + self.grid**2
        rows = slice(start, start + latents.shape[1])
        parts = [(self.class_embedding + self.positional_embedding[:1])[None], patches, latents]
        x = self.transformed(parts + ([] if words is None else [self.guidance(words)]), image.shape[0], rows)
        return F.linear(x, self.conv_out.weight.flatten(1), self.conv_out.bias)


class _Decoder(_Half):
    """Decodes latent tokens [B, latents, token] into an image [B, 3, S, S]."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        half = sizes["decoder"]
        super().__init__(sizes, half, text=True)
        self.patch = sizes["patch"]
        self.mask_token = nn.Parameter(torch.empty(1, 1, half["width"]))
        self.decoder_embed = nn.Linear(sizes["token"], half["width"])
        self.ffn = nn.Sequential(nn.Conv2d(half["width"], 3 * self.patch**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, latents: Tensor, words: Tensor) -> Tensor:
        patches = self.mask_token[0].expand(self.grid**2, -1)
        before = torch.cat((self.class_embedding, patches)) + self.positional_embedding
        tile = self.decoder_embed(latents) + self.latent_token_positional_embedding
        parts = (before[None], tile, self.guidance(words))
        x = self.transformed(parts, latents.shape[0], slice(1, 1 + self.grid**2))
        pixels: Any = self.ffn[0]
        x = F.linear(x, pixels.weight.flatten(1), pixels.bias)
        return self.conv_out(unpatch(x, self.grid, self.grid, self.patch))


class Tokenise(nn.Module):
    """Scaled tokens [B, token, 1, latents] of an image [B, 3, S, S] in [0, 1]; TexTok's encoder reads words too."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.token, self.scale = sizes["token"], sizes["scale"]
        self.latent_tokens = nn.Parameter(torch.empty(sizes["latents"], sizes["encoder"]["width"]))
        self.encoder = _Encoder(sizes)

    def forward(self, image: Tensor, words: Tensor | None = None) -> Tensor:
        mean = self.encoder(image, self.latent_tokens, words)[:, :, : self.token]
        return (self.scale * mean).transpose(1, 2).unsqueeze(2)


class Detokenise(nn.Module):
    """The image [B, 3, S, S] in [0, 1] of scaled tokens [B, token, 1, latents] and words [B, N, D]."""

    def __init__(self, sizes: Mapping[str, Any]) -> None:
        super().__init__()
        self.scale = sizes["scale"]
        self.decoder = _Decoder(sizes)

    def forward(self, tokens: Tensor, words: Tensor) -> Tensor:
        return self.decoder(tokens.squeeze(2).transpose(1, 2) / self.scale, words).clamp(0, 1)


def _out(width: int, projected: bool) -> nn.Module:
    return nn.Linear(width, width) if projected else nn.Identity()


class _Self(nn.Module):
    """Self-attention of the denoiser, for the queries in `rows` only."""

    def __init__(self, width: int, heads: int, projected: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), _out(width, projected)

    def forward(self, x: Tensor, rows: slice) -> Tensor:
        query, key, value = self.qkv(x).chunk(3, 2)
        return self.out(_attend(query[:, rows], key, value, self.heads))


class _Cross(nn.Module):
    """Attention of rows [B, n, D] to a few tokens, in parts [C, B / C or 1, T, D]."""

    def __init__(self, width: int, heads: int, projected: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = _out(width, projected)

    def forward(self, x: Tensor, parts: Sequence[Tensor], batch: int) -> Tensor:
        spread = [self.kv(part).expand(-1, batch, -1, -1) for part in parts]
        key, value = torch.cat(spread, 2).flatten(0, 1).chunk(2, 2)
        return self.out(_attend(self.q(x), key, value, self.heads))


class _DitBlock(nn.Module):
    """Self-attention, cross-attention and MLP, each after a norm and with a residual connection."""

    def __init__(self, width: int, heads: int, projected: bool) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(width), _Self(width, heads, projected)
        self.ln_2, self.cross = nn.LayerNorm(width), _Cross(width, heads, projected)
        self.ln_3, self.mlp = nn.LayerNorm(width), _Mlp(width)

    def forward(self, x: Tensor, parts: Sequence[Tensor], batch: int, rows: slice) -> Tensor:
        x = x[:, rows] + self.attn(self.ln_1(x), rows)
        x = x + self.cross(self.ln_2(x), parts, batch)
        return x + self.mlp(self.ln_3(x))


class _Dit(nn.Module):
    """The denoiser: one sequence of noisy and condition tokens, with cross-attention to timestep and label."""

    def __init__(self, sizes: Mapping[str, Any], dit: Mapping[str, Any]) -> None:
        super().__init__()
        width, self.latents = dit["width"], sizes["latents"]
        exponents = -math.log(10_000) * torch.arange(SINUSOID // 2, dtype=torch.float64) / (SINUSOID // 2)
        # a buffer: computed by a backend, the last bit of the frequencies shows at timestep 999
        self.frequencies = nn.Buffer(exponents.exp().float(), persistent=False)
        self.embed = nn.Linear(sizes["token"], width)
        self.positions = nn.Embedding(self.latents, width)
        self.time = nn.Sequential(nn.Linear(SINUSOID, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(sizes["text_width"], width)
        self.condition_norm = nn.LayerNorm(width)
        blocks = (_DitBlock(width, dit["heads"], dit["output_projection"]) for _ in range(dit["layers"]))
        self.blocks = nn.ModuleList(blocks)
        self.out = nn.Linear(width, sizes["token"])

    def condition(self, t: Tensor, labels: Tensor, batch: int) -> list[Tensor]:
        """The tokens for cross-attention: timestep [1, B or 1, 1, D] and labels [C, B or 1, T, D].

        One token of a label is joined with the timestep, for every tile: fewer calls cost less than fewer rows.
        """
        angles = t[:, None] * self.frequencies
        time = self.time(torch.cat((angles.cos(), angles.sin()), 1))[None, :, None]
        parts = [time.expand(labels.shape[0], -1, -1, -1), self.label(labels)]
        if labels.shape[2] == 1:
            parts = [torch.cat([part.expand(-1, batch, -1, -1) for part in parts], 2)]
        return [self.condition_norm(part) for part in parts]

    def forward(self, noisy: Tensor, condition_tokens: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The prediction [C * B, token, 1, latents] for all tiles with the first set of labels, then with the next.

        `labels` [C, B or 1, T, D].
        """
        x = self.embed(torch.cat((noisy, condition_tokens), 3).squeeze(2).transpose(1, 2))
        x = (x.unflatten(1, (2, self.latents)) + self.positions.weight).flatten(1, 2)
        x = x if labels.shape[0] == 1 else torch.cat([x] * labels.shape[0])
        batch = noisy.shape[0]
        parts = self.condition(t, labels, batch)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, parts, batch, ALL)
        # nothing reads the last block's result for the condition tokens
        x = last(x, parts, batch, slice(self.latents))
        return self.out(x).transpose(1, 2).unsqueeze(2)


class Step(nn.Module):
    """One deterministic DDIM step in float32, from (alpha, beta) to (alpha_next, beta_next)."""

    def __init__(self, sizes: Mapping[str, Any], dit: Mapping[str, Any]) -> None:
        super().__init__()
        self.predicts_x0 = {"eps": False, "x0": True}[dit["prediction"]]
        self.dit = _Dit(sizes, dit)

    def forward(
        self,
        tokens: Tensor,
        condition: Tensor,
        t: Tensor,
        alpha: Tensor,
        beta: Tensor,
        alpha_next: Tensor,
        beta_next: Tensor,
        pooled: Tensor | None = None,
        words: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The next tokens. The label is the pooled text or all words; guidance also predicts with a label of zeros."""
        label = words if pooled is None else pooled[:, None]
        assert label is not None
        alpha, beta, alpha_next, beta_next = (x[..., None, None, None] for x in (alpha, beta, alpha_next, beta_next))
        if guidance is None:
            answer = self.dit(tokens, condition, t, label[None])
        else:
            both = self.dit(tokens, condition, t, torch.stack((torch.zeros_like(label), label)))
            without, answer = both[: tokens.shape[0]], both[tokens.shape[0] :]
            answer = without + guidance[..., None, None, None] * (answer - without)
        if self.predicts_x0:
            x0, noise = answer, (tokens - alpha * answer) / beta
        else:
            x0, noise = (tokens - beta * answer) / alpha, answer
        return alpha_next * x0 + beta_next * noise
