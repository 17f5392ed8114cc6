"""Image encoders of the restoration systems, and how their published preprocessing looks inside a graph.

The resize is two matrix products, because TensorRT has no antialiased Resize. It is Pillow's bicubic without the
rounding to 8 bits; the matrices are computed from the image's sizes, which are free.
"""

from typing import Any

import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from torch import Tensor, nn
from torch.nn.functional import gelu
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

__all__ = ["Bridge", "ClipVision", "Redux", "Siglip", "resize_matrix", "resized"]


def resize_matrix(length: int, size: int, start: int, count: int, device: torch.device) -> Tensor:
    """Samples `start` to `start + count` of `length` samples resized to `size`, as a matrix [count, length]."""
    source = 2 * torch.arange(length, device=device) + 1
    target = 2 * (torch.arange(count, device=device) + start) + 1
    # whole numbers up to here: float32 would lose the difference of two positions that are far from zero
    offset = (source * size - target.unsqueeze(1) * length).float()
    distance = (offset.abs() / (2 * torch.sym_max(length, size))).clamp(max=2)
    # Keys' two cubics for a = -0.5, which have the factor 1 - distance in common
    inner, outer = 1 + distance - 1.5 * distance * distance, 0.5 * (2 - distance) * (2 - distance)
    weights = (1 - distance) * torch.where(distance < 1, inner, outer)
    return weights / weights.sum(1, keepdim=True)


def resized(image: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Image [B, C, H, W] in [0, 1] by matrices [h, H] and [w, W]; each pass is clamped, as 8 bits would be."""
    # the order matters where a pass overshoots; Pillow had this one for every size until version 13
    return (rows @ (image @ columns.T).clamp(0, 1)).clamp(0, 1)


class Siglip(nn.Module):
    """Image [B, 3, H, W] in [0, 1], squeezed into a square, to features [B, tokens, hidden]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = SiglipVisionModel(SiglipVisionConfig(**config, vision_use_head=False))
        self.side: int = config["image_size"]

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.pixels(image)).last_hidden_state

    def pixels(self, image: Tensor) -> Tensor:
        """What the published processor makes of an image, in [-1, 1]."""
        rows, columns = (resize_matrix(length, self.side, 0, self.side, image.device) for length in image.shape[2:])
        return resized(image, rows, columns) * 2 - 1


class Redux(nn.Module):
    """SigLIP's features [B, tokens, in] to tokens [B, tokens, out] beside those of the text."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.model = ReduxImageEncoder(width_in, width_out)

    def forward(self, features: Tensor) -> Tensor:
        return self.model(features).image_embeds


class ClipVision(nn.Module):
    """The central square of an image [B, 3, H, W] in [0, 1] to its embedding [B, out]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(**config))
        self.side: int = config["image_size"]
        self.mean = nn.Buffer(torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1), persistent=False)
        self.deviation = nn.Buffer(torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return self.model(self.pixels(image)).image_embeds

    def pixels(self, image: Tensor) -> Tensor:
        """What the published processor makes of an image: the shortest side resized, the centre cut out."""
        short = torch.sym_min(image.shape[2], image.shape[3])
        # the longer side is rounded down, and so is the crop's offset
        sizes = [self.side * length // short for length in image.shape[2:]]
        rows, columns = (
            resize_matrix(length, size, (size - self.side) // 2, self.side, image.device)
            for length, size in zip(image.shape[2:], sizes, strict=True)
        )
        return (resized(image, rows, columns) - self.mean) / self.deviation


class Bridge(nn.Module):
    """VICR's vision-context bridge: CLIP's embedding [B, in] to what is added to the pooled text [B, out]."""

    def __init__(self, width_in: int, width: int, width_out: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width_in)
        self.fc1 = nn.Linear(width_in, width)
        self.fc2 = nn.Linear(width, width_out)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, embeds: Tensor) -> Tensor:
        return self.scale * self.fc2(gelu(self.fc1(self.norm(embeds))))
