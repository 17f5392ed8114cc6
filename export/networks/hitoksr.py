"""HiTokSR: a tokenizer with grouped codebooks and a generator that predicts its tokens in one pass.

The paper does not describe the stem; this one fits its published counts of parameters and operations.
The sequence of tokens is [class tokens of the vision model, shallow to deep | patches, row-major].
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from tilewright.kernels.codebook_from_hidden import codebook_from_hidden
from tilewright.kernels.codebook_nearest import codebook_nearest
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope

__all__ = ["Decode", "Decoder", "Encoder", "Generate", "Generator", "HiTokConfig", "Quantizer", "VisionPrior"]


@dataclass(frozen=True)
class HiTokConfig:
    """Sizes of every network of the system."""

    dim: int = 768
    heads: int = 12
    depth: int = 12
    mlp_dim: int = 2048
    patch_px: int = 16
    groups: int = 4
    codes: int = 4096  # codewords in each group
    code_dim: int = 8  # width of one group's codeword
    stem: tuple[int, ...] = (64, 128, 256, 512, 768)  # channels of each level; a stride of 2 between levels
    stem_blocks: int = 2
    stem_norm_groups: int = 32
    class_layers: tuple[int, ...] = (3, 6, 9, 12)  # layers of the vision model whose class token is read
    vision: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "patch_size": 16,
            "num_register_tokens": 4,
        }
    )

    @property
    def latent_dim(self) -> int:
        """Width of one token's codewords, all groups together."""
        return self.groups * self.code_dim


def rope_tables(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows * columns, head_dim / 2]: half of the angles depend on the row, half on the column."""
    frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 4, device=device) / head_dim)
    row = (torch.arange(rows, device=device).float()[:, None] * frequencies).unsqueeze(1).expand(-1, columns, -1)
    column = (torch.arange(columns, device=device).float()[:, None] * frequencies).unsqueeze(0).expand(rows, -1, -1)
    angles = torch.cat([row, column], -1).flatten(0, 1)
    return angles.cos(), angles.sin()


class Attention(nn.Module):
    """Self-attention. The tables rotate the patch tokens, not the class tokens before them."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        weights = self.to_q.weight, self.to_k.weight, self.to_v.weight
        q, k, v = qkv_norm_rope(x, None, *weights, cos=cos, sin=sin, heads=self.heads)
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, dim: int, mlp_dim: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, mlp_dim, bias=False)
        self.up = nn.Linear(dim, mlp_dim, bias=False)
        self.down = nn.Linear(mlp_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.norm1 = nn.RMSNorm(config.dim, eps=1e-6)
        self.attention = Attention(config.dim, config.heads)
        self.norm2 = nn.RMSNorm(config.dim, eps=1e-6)
        self.mlp = SwiGLU(config.dim, config.mlp_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        return x + self.mlp(self.norm2(x))


class GuidedBlock(Block):
    """A block whose normed patch tokens are scaled and shifted by the vision model's patches."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__(config)
        self.sft1 = nn.Linear(config.vision["hidden_size"], 2 * config.dim)
        self.sft2 = nn.Linear(config.vision["hidden_size"], 2 * config.dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, patches: Tensor) -> Tensor:  # type: ignore[override]
        x = x + self.attention(modulate(self.norm1(x), self.sft1(patches)), cos, sin)
        return x + self.mlp(modulate(self.norm2(x), self.sft2(patches)))


def modulate(x: Tensor, sft: Tensor) -> Tensor:
    """x * (1 + gamma) + beta for the patch tokens; the class tokens before them are unchanged."""
    prefix = x.shape[1] - sft.shape[1]
    gamma, beta = sft.chunk(2, -1)
    return torch.cat([x[:, :prefix], x[:, prefix:] * (1 + gamma) + beta], 1)


class ResidualBlock(nn.Module):
    """Two GroupNorm-SiLU-convolutions and a shortcut."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        return x + self.conv2(silu(self.norm2(h)))


def stem(config: HiTokConfig) -> nn.Sequential:
    """From pixels to tokens: levels of residual blocks, a strided convolution between levels, and a last 1x1."""
    layers: list[nn.Module] = [nn.Conv2d(3, config.stem[0], 3, padding=1)]
    for level, channels in enumerate(config.stem):
        if level:
            layers.append(nn.Conv2d(config.stem[level - 1], channels, 3, stride=2, padding=1))
        layers += [ResidualBlock(channels, config.stem_norm_groups) for _ in range(config.stem_blocks)]
    return nn.Sequential(*layers, nn.Conv2d(config.stem[-1], config.dim, 1))


class VisionPrior(nn.Module):
    """DINOv3: the normed patch tokens of its last layer, and the class tokens of several layers."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.vfm = DINOv3ViTModel(DINOv3ViTConfig(**config.vision))  # type: ignore[arg-type]
        self.vfm.embeddings.mask_token = None  # type: ignore[assignment]  # for training; no graph reads it
        self.class_layers = config.class_layers
        self.prefix = 1 + config.vision["num_register_tokens"]

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Patches [B, N, D] and class tokens [B, L, D] of ImageNet-normalised pixels."""
        hidden = self.vfm.embeddings(pixels)
        positions = self.vfm.rope_embeddings(pixels)
        class_tokens = []
        for depth, layer in enumerate(self.vfm.model.layer, start=1):
            hidden = layer(hidden, position_embeddings=positions)
            if depth in self.class_layers:
                class_tokens.append(hidden[:, :1])
        return self.vfm.norm(hidden)[:, self.prefix :], self.vfm.norm(torch.cat(class_tokens, 1))


class Generator(nn.Module):
    """Predicts codebook indices and codewords of upsampled low-quality pixels."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = stem(config)
        self.cls = nn.ModuleList(nn.Linear(config.vision["hidden_size"], config.dim) for _ in config.class_layers)
        self.blocks = nn.ModuleList(GuidedBlock(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.head = nn.Linear(config.dim, config.groups * config.codes)

    def hidden(self, pixels: Tensor, patches: Tensor, class_tokens: Tensor) -> Tensor:
        """Normed patch tokens [B, N, dim], the input of the head."""
        features = self.stem(pixels)
        rows, columns = features.shape[-2:]
        cos, sin = rope_tables(rows, columns, self.config.dim // self.config.heads, pixels.device)
        projected = [project(token) for project, token in zip(self.cls, class_tokens.split(1, 1), strict=True)]
        x = torch.cat([*projected, features.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x, cos, sin, patches)
        return self.norm(x[:, len(projected) :])

    def forward(self, pixels: Tensor, patches: Tensor, class_tokens: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
        """Indices [B, N, G] and codewords [B, N, G*D]."""
        hidden = self.hidden(pixels, patches, class_tokens)
        return codebook_from_hidden(hidden, self.head.weight, self.head.bias, codebook)


class Decoder(nn.Module):
    """Makes pixels in [-1, 1] of codewords [B, G*D, rows, columns]."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.latent_dim, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.out = nn.Linear(config.dim, 3 * config.patch_px**2)

    def forward(self, codes: Tensor) -> Tensor:
        rows, columns = codes.shape[-2:]
        cos, sin = rope_tables(rows, columns, self.config.dim // self.config.heads, codes.device)
        x = self.embed(codes.flatten(2).transpose(1, 2))
        for block in self.blocks:
            x = block(x, cos, sin)
        return unpatch(self.out(self.norm(x)), rows, columns, self.config.patch_px)


def unpatch(tokens: Tensor, rows: int, columns: int, patch_px: int) -> Tensor:
    """Tokens [B, rows*columns, patch*patch*3], channel fastest, to pixels [B, 3, H, W]."""
    pixels = tokens.unflatten(-1, (patch_px, patch_px, 3)).unflatten(1, (rows, columns))
    return pixels.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class Encoder(nn.Module):
    """Makes the tokenizer's latents [B, N, G*D] of pixels in [-1, 1]. Only training and tests use it."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Conv2d(3, config.dim, config.patch_px, stride=config.patch_px)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.RMSNorm(config.dim, eps=1e-6)
        self.out = nn.Linear(config.dim, config.latent_dim)

    def forward(self, pixels: Tensor) -> Tensor:
        features = self.embed(pixels)
        rows, columns = features.shape[-2:]
        cos, sin = rope_tables(rows, columns, self.config.dim // self.config.heads, pixels.device)
        x = features.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, cos, sin)
        return self.out(self.norm(x))


class Quantizer(nn.Module):
    """Codebooks, one for each group of channels; later groups refine earlier ones."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(config.groups, config.codes, config.code_dim))

    def forward(self, latents: Tensor, active: int | None = None) -> tuple[Tensor, Tensor]:
        """Indices [..., G] and codewords [..., G*D]. Only the first `active` groups count, the others are zeros."""
        indices, codes = codebook_nearest(latents, self.codebook)
        count = len(self.codebook) if active is None else active
        mask = torch.arange(len(self.codebook), device=codes.device) < count
        return indices, codes * mask.repeat_interleave(self.codebook.shape[-1])


class Generate(nn.Module):
    """Component `generate`: image [B, 3, H, W] in [0, 1] to codes [B, G*D, h, w] and indices [B, G, h, w]."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.vision = VisionPrior(config)
        self.generator = Generator(config)
        self.quantizer = Quantizer(config)
        self.mean = nn.Buffer(torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.deviation = nn.Buffer(torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        patches, class_tokens = self.vision((image - self.mean) / self.deviation)
        indices, codes = self.generator(image * 2 - 1, patches, class_tokens, self.quantizer.codebook)
        grid = self.grid(image)
        return codes.transpose(1, 2).unflatten(2, grid), indices.transpose(1, 2).unflatten(2, grid)

    def grid(self, image: Tensor) -> tuple[int, int]:
        """Rows and columns of tokens."""
        patch = self.generator.config.patch_px
        return image.shape[2] // patch, image.shape[3] // patch

    def winners(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """The best two scores of every choice [B, G, h, w, 2] and the best index [B, G, h, w]; for verification."""
        patches, class_tokens = self.vision((image - self.mean) / self.deviation)
        logits = self.generator.head(self.generator.hidden(image * 2 - 1, patches, class_tokens))
        best = logits.unflatten(-1, self.quantizer.codebook.shape[:2]).topk(2, -1)  # [B, N, G, 2]
        scores, indices = (t.transpose(1, 2).unflatten(2, self.grid(image)) for t in best)
        return scores, indices[..., 0]


class Decode(nn.Module):
    """Component `decode`: codes [B, G*D, h, w] to image [B, 3, H, W] in [0, 1]."""

    def __init__(self, config: HiTokConfig) -> None:
        super().__init__()
        self.decoder = Decoder(config)

    def forward(self, codes: Tensor) -> Tensor:
        return (self.decoder(codes) + 1).mul(0.5).clamp(0, 1)


def generate(**sizes: Any) -> Generate:
    """The component `generate` of these sizes."""
    return Generate(HiTokConfig(**sizes))


def decode(**sizes: Any) -> Decode:
    """The component `decode` of these sizes."""
    return Decode(HiTokConfig(**sizes))
