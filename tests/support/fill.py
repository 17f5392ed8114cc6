"""The systems on FLUX.1-Fill, written from diffusers' and transformers' own parts, one image region at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from PIL import Image
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, pixel_shuffle, pixel_unshuffle

__all__ = ["Canvas", "Fill", "InToken", "Vicr", "distance", "packed", "psnr"]


class Canvas:
    """An image's planes as the runtime takes them."""

    def __init__(self, planes: np.ndarray) -> None:
        self.planes, self.shape = planes, planes.shape

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        return np.ascontiguousarray(self.planes[:, top : top + height, left : left + width])


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.mean((one.astype(np.float64) - other) ** 2)))


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Relative L2."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def packed(latent: Tensor) -> Tensor:
    return pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)


@dataclass
class Fill:
    """What both systems do with FLUX.1-Fill."""

    transformer: Any
    vae: Any
    schedule: Mapping[str, Any]  # of the scheduler's configuration

    @property
    def spatial(self) -> int:
        """Pixels behind a cell of the latent."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def sigmas(self, tokens: int, steps: int) -> Tensor:
        """As FluxFillPipeline sets diffusers' scheduler."""
        line = (self.schedule[f"{end}_{what}"] for what in ("image_seq_len", "shift") for end in ("base", "max"))
        scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(tokens, *line))
        return scheduler.sigmas

    def encode(self, pixels: Tensor) -> Tensor:
        """Of pixels in [-1, 1]."""
        mean = self.vae.encode(pixels).latent_dist.mean
        return (mean - (self.vae.config.shift_factor or 0)) * self.vae.config.scaling_factor

    def decode(self, z: Tensor) -> np.ndarray:
        config = self.vae.config
        image = self.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample
        return ((image.clamp(-1, 1) + 1) / 2)[0].numpy()

    def velocity(self, z: Tensor, y: Tensor, mask: Tensor, words: Tensor, pooled: Tensor, sigma: Tensor) -> Tensor:
        rows, columns = z.shape[2] // 2, z.shape[3] // 2
        ids = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1).reshape(-1, 2)
        v = self.transformer(
            hidden_states=torch.cat((packed(z), packed(y), mask), 2),
            encoder_hidden_states=words,
            pooled_projections=pooled,
            timestep=sigma[None],
            guidance=torch.tensor([30.0]),
            img_ids=torch.cat((torch.zeros(len(ids), 1), ids.float()), 1),
            txt_ids=torch.zeros(words.shape[1], 3),
        ).sample
        return pixel_shuffle(v.transpose(1, 2).unflatten(2, (rows, columns)), 2)


@dataclass
class InToken(Fill):
    """In-Token Learning on one region."""

    siglip: Any
    redux: Any
    processor: Mapping[str, Any]  # mean and deviation of its configuration
    context: Tensor
    pooled: Tensor

    def given(self, image: np.ndarray) -> Tensor:
        """The condition y."""
        return self.encode(torch.from_numpy(image)[None] * 2 - 1)

    def see(self, image: np.ndarray) -> Tensor:
        """By Pillow in floating point: the published processor without its rounding to 8 bits."""
        side = (self.siglip.config.image_size,) * 2
        planes = [np.asarray(Image.fromarray(plane).resize(side, Image.Resampling.BICUBIC)) for plane in image]
        mean, deviation = (torch.tensor(self.processor[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        pixels = (torch.from_numpy(np.stack(planes)).clamp(0, 1)[None] - mean) / deviation
        return self.redux(self.siglip(pixels).last_hidden_state).image_embeds

    def step(self, z: Tensor, y: Tensor, seen: Tensor, sigma: Tensor, following: Tensor) -> Tensor:
        mask = torch.zeros(1, z.shape[2] * z.shape[3] // 4, 4 * self.spatial**2)
        words = torch.cat((self.context, seen), 1)
        return z + (following - sigma) * self.velocity(z, y, mask, words, self.pooled, sigma)

    @torch.no_grad()
    def walk(self, image: np.ndarray, noise: np.ndarray, steps: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Every step's latent, and the picture."""
        z, y, seen, path = torch.from_numpy(noise)[None], self.given(image), self.see(image), []
        sigmas = self.sigmas(z.shape[2] * z.shape[3] // 4, steps)
        for sigma, following in pairwise(sigmas):
            z = self.step(z, y, seen, sigma, following)
            path.append(z.numpy())
        return path, self.decode(z)


@dataclass
class Vicr(Fill):
    """VICR on one panel."""

    clip: Any
    pixels: Any  # an image [1, 3, H, W] as CLIP takes it
    bridge: Mapping[str, Tensor]
    context: Tensor
    pooled: Tensor

    def bridged(self, image: np.ndarray) -> Tensor:
        """The pooled text and what the image adds to it."""
        embeds, vcb = self.clip(self.pixels(torch.from_numpy(image)[None])).image_embeds, self.bridge
        normed = layer_norm(embeds, embeds.shape[1:], vcb["vcb.norm.weight"], vcb["vcb.norm.bias"])
        inner = gelu(normed @ vcb["vcb.fc1.weight"].T + vcb["vcb.fc1.bias"])
        return self.pooled + vcb["vcb.scale"] * (inner @ vcb["vcb.fc2.weight"].T + vcb["vcb.fc2.bias"])

    @torch.no_grad()
    def walk(self, image: np.ndarray, noise: np.ndarray, steps: int) -> tuple[list[np.ndarray], np.ndarray]:
        """Every step's latent and the right panel, as FluxFillPipeline would make them of a diptych."""
        (_, height, width), pooled = image.shape, self.bridged(image)
        canvas = torch.cat((torch.from_numpy(image)[None] * 2 - 1, torch.zeros(1, 3, height, width)), 3)
        mask = torch.cat((torch.zeros(1, 1, height, width), torch.ones(1, 1, height, width)), 3)
        y, mask_tokens = self.encode(canvas * (1 - mask)), packed(pixel_unshuffle(mask, self.spatial))
        z, path = torch.from_numpy(noise)[None], []
        sigmas = self.sigmas(z.shape[2] * z.shape[3] // 4, steps)
        for sigma, following in pairwise(sigmas):
            v = self.velocity(z, y, mask_tokens, self.context, pooled, sigma)
            z = z + (following - sigma) * v
            path.append(z.numpy())
        return path, self.decode(z)[:, :, width:]
