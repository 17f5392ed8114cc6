"""Encoder and decoder of diffusers' AutoencoderKL. The encoder gives the mean, and attention runs in parts."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

__all__ = ["Decode", "Encode"]

QUERY_CHUNKS = 32  # parts of the attention: the scores of 57,600 tokens shrink from 13 GB to 0.4 GB


class _Chunked:
    """The VAE's attention over all pixels, some queries at a time, so that the whole score matrix never exists."""

    def __call__(self, attn: Any, x: Tensor, temb: Tensor | None = None, **unused: None) -> Tensor:
        batch, channels, height, width = x.shape
        tokens = height * width
        part = (tokens + QUERY_CHUNKS - 1) // QUERY_CHUNKS
        normed = attn.group_norm(x).flatten(2).transpose(1, 2)
        query, key, value = attn.to_q(normed), attn.to_k(normed), attn.to_v(normed)
        padded = F.pad(query, (0, 0, 0, part * QUERY_CHUNKS - tokens)).reshape(batch, QUERY_CHUNKS, part, channels)
        key, value = key[:, None], value[:, None]
        attended = [F.scaled_dot_product_attention(q, key, value) for q in padded.chunk(QUERY_CHUNKS, 1)]
        out = torch.cat(attended, 2)[:, 0, :tokens]
        return x + attn.to_out[0](out).transpose(1, 2).unflatten(2, (height, width))


class _Vae(nn.Module):
    """The encoder or the decoder of diffusers' AutoencoderKL."""

    def __init__(self, config: Mapping[str, Any], half: str) -> None:
        super().__init__()
        self.encoder: Any
        self.decoder: Any
        self.quant_conv: Any
        self.post_quant_conv: Any
        vae: Any = AutoencoderKL(**config)
        self.scaling, self.shift = float(config["scaling_factor"]), float(config.get("shift_factor") or 0)
        self.spatial = 2 ** (len(config["block_out_channels"]) - 1)
        self.add_module(half, getattr(vae, half))
        getattr(self, half).mid_block.attentions[0].set_processor(_Chunked())
        name = "quant_conv" if half == "encoder" else "post_quant_conv"
        self.add_module(name, getattr(vae, name) or nn.Identity())


class Encode(_Vae):
    """The scaled latent of an image [B, 3, H, W] in [0, 1]. A diptych has the image on the left, grey on the right."""

    def __init__(self, config: Mapping[str, Any], *, diptych: bool = False) -> None:
        super().__init__(config, "encoder")
        self.diptych = diptych

    def forward(self, image: Tensor) -> Tensor:
        x = 2 * image - 1
        x = torch.cat((x, torch.zeros_like(x)), 3) if self.diptych else x
        mean = self.quant_conv(self.encoder(x)).chunk(2, 1)[0]
        return (mean - self.shift) * self.scaling


class Decode(_Vae):
    """The image in [0, 1] of a latent. A diptych gives its right half, decoded with all columns or with a margin."""

    def __init__(self, config: Mapping[str, Any], *, diptych: bool = False, margin: int | None = None) -> None:
        super().__init__(config, "decoder")
        self.diptych, self.margin = diptych, margin

    def forward(self, latent: Tensor) -> Tensor:
        panel = latent.shape[3] // 2
        if self.diptych and self.margin is not None:
            latent = latent[:, :, :, torch.sym_max(panel - self.margin, 0) :]
        z = self.post_quant_conv(latent / self.scaling + self.shift)
        image = (self.decoder(z).clamp(-1, 1) + 1) / 2
        return image[:, :, :, image.shape[3] - panel * self.spatial :] if self.diptych else image
