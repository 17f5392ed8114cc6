"""Image encoders of the restoration systems, with the published preprocessing of images inside the graph.

The resize is Pillow's bicubic without the rounding to 8 bits. It is two matrix products, because TensorRT has no
antialiased Resize. The graph computes the matrices, since images may have any size.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor, nn
from torch.nn.functional import gelu, interpolate
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    SiglipVisionConfig,
    SiglipVisionModel,
)

__all__ = [
    "Bridge",
    "ClipVision",
    "Dino",
    "DinoOfNothing",
    "DinoPositions",
    "Redux",
    "Siglip",
    "cropped",
    "resize_matrix",
    "resized",
]


def resize_matrix(length: int, size: int, start: int, count: int, device: torch.device) -> Tensor:
    """The matrix [count, length] that resizes `length` samples to `size`, and keeps `count` of them from `start` on."""
    source = 2 * torch.arange(length, device=device) + 1
    target = 2 * (torch.arange(count, device=device) + start) + 1
    # integers up to here: in float32, the difference of two large positions would lose its digits
    offset = (source * size - target.unsqueeze(1) * length).float()
    distance = (offset.abs() / (2 * torch.sym_max(length, size))).clamp(max=2)
    # Keys' two cubics for a = -0.5; both have the factor 1 - distance
    inner, outer = 1 + distance - 1.5 * distance * distance, 0.5 * (2 - distance) * (2 - distance)
    weights = (1 - distance) * torch.where(distance < 1, inner, outer)
    return weights / weights.sum(1, keepdim=True)


def resized(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Resize an image [B, C, H, W] in [0, 1] with matrices [h, H] and [w, W]; 8 bits would clamp each pass too."""
    # the order matters if a pass overshoots; up to version 13 Pillow has used this order for every size
    return (rows @ (image @ columns.T).clamp(0, 1)).clamp(0, 1)


def cropped(image: Tensor, short: int, side: int) -> Tensor:
    """Resize an image so that its shortest side is `short`, and cut out the central square of `side`."""
    shortest = torch.sym_min(image.shape[2], image.shape[3])
    # the longer side and the crop's offset are rounded down
    sizes = [short * length // shortest for length in image.shape[2:]]
    rows, columns = (
        resize_matrix(length, size, (size - side) // 2, side, image.device)
        for length, size in zip(image.shape[2:], sizes, strict=True)
    )
    return resized(image, rows, columns)


class Siglip(nn.Module):
    """SigLIP: features [B, tokens, hidden] of an image [B, 3, H, W] in [0, 1], which is squeezed into a square."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        mean: Sequence[float] = (0.5, 0.5, 0.5),
        deviation: Sequence[float] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        self.model = SiglipVisionModel(SiglipVisionConfig(**config, vision_use_head=False))
        self.side: int = config["image_size"]
        factors = [1 / d for d in deviation]
        offsets = [m / d for m, d in zip(mean, deviation, strict=True)]
        self.factor, self.offset = (
            nn.Buffer(torch.tensor(numbers).view(3, 1, 1), persistent=False) for numbers in (factors, offsets)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.pixels(image)).last_hidden_state

    def pixels(self, image: Tensor) -> Tensor:
        """The pixels that the published image processor makes, in [-1, 1] with its usual mean and deviation."""
        rows, columns = (resize_matrix(length, self.side, 0, self.side, image.device) for length in image.shape[2:])
        return resized(image, rows, columns) * self.factor - self.offset


class Redux(nn.Module):
    """Redux: makes image tokens [B, tokens, out] for the transformer of SigLIP's features [B, tokens, in]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.model = ReduxImageEncoder(width_in, width_out)

    def forward(self, features: Tensor) -> Tensor:
        return self.model(features).image_embeds


class ClipVision(nn.Module):
    """CLIP: the embedding [B, out] of the central square of an image [B, 3, H, W] in [0, 1]."""

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        short: int | None = None,  # the shortest side before the centre is cut out; none: the side of the centre
        mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        deviation: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
    ) -> None:
        super().__init__()
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.side: int = config["image_size"]
        self.short = short or self.side
        self.mean, self.deviation = (
            nn.Buffer(torch.tensor(tuple(numbers)).view(3, 1, 1), persistent=False) for numbers in (mean, deviation)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.pixels(image)).image_embeds

    def pixels(self, image: Tensor) -> Tensor:
        """The pixels that the published image processor makes: resized, the centre cut out, normalised."""
        return (cropped(image, self.short, self.side) - self.mean) / self.deviation


class DinoPositions(nn.Module):
    """DINOv2's position embeddings [1, 1 + rows * columns, D], resized to the grid of another image size."""

    def __init__(self, config: dict[str, Any], side: int, *, release: bool) -> None:
        super().__init__()
        model = Dinov2Model(Dinov2Config(**config))
        self.position_embeddings = model.embeddings.position_embeddings
        self.stored, self.cells = (length // int(config["patch_size"]) for length in (config["image_size"], side))
        self.release = release

    def forward(self) -> Tensor:
        """Resized as in transformers 4.36, whose factor has an extra tenth of a cell, or as in transformers 5."""
        if self.cells == self.stored:
            return self.position_embeddings
        first, rest = self.position_embeddings.split((1, self.stored**2), 1)
        grid = rest.unflatten(1, (self.stored, self.stored)).permute(0, 3, 1, 2)
        factor = (self.cells + 0.1) / self.stored
        size: dict[str, Any] = {"scale_factor": (factor, factor)} if self.release else {"size": (self.cells,) * 2}
        resized = interpolate(grid, mode="bicubic", align_corners=False, **size)
        return torch.cat((first, resized.flatten(2).transpose(1, 2)), 1)


class _Tokens(nn.Module):
    """DINOv2's embeddings without positions."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.patch_embeddings, self.cls_token = embeddings.patch_embeddings, embeddings.cls_token

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixels)
        return torch.cat((self.cls_token.expand(patches.shape[0], -1, -1), patches), 1)


class Dino(nn.Module):
    """DINOv2: features [B, 1 + patches, D] of the central square of an image [B, 3, H, W] in [0, 1]."""

    def __init__(
        self, config: dict[str, Any], side: int, short: int, mean: list[float], deviation: list[float]
    ) -> None:
        super().__init__()
        self.model: Any = Dinov2Model(Dinov2Config(**config))
        self.model.add_module("embeddings", _Tokens(self.model.embeddings))
        self.side, self.short = side, short
        self.mean = nn.Buffer(torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.deviation = nn.Buffer(torch.tensor(deviation).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor, positions: Tensor) -> Tensor:
        return self.features((cropped(image, self.short, self.side) - self.mean) / self.deviation, positions)

    def features(self, pixels: Tensor, positions: Tensor) -> Tensor:
        """The features of normalised pixels."""
        model = self.model
        return model.layernorm(model.encoder(model.embeddings(pixels) + positions).last_hidden_state)


class DinoOfNothing(Dino):
    """DINOv2's features of an image in the mean colour, for the half of guidance without the image."""

    def forward(self, positions: Tensor) -> Tensor:  # type: ignore[override]
        return self.features(torch.zeros(1, 3, self.side, self.side), positions)


class Bridge(nn.Module):
    """VICR's vision-context bridge: makes of CLIP's embedding [B, in] a vector for the pooled text [B, out]."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.scale * self.fc2(gelu(self.fc1(self.norm(embeds))))
