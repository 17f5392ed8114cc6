"""Initialise a VAE of diffusers as a linear one: after seconds it is as good as after half an hour of training.

Residual branches begin as zero, so a chain of convolutions is left, and a norm and a SiLU before each end. A value
passes the SiLU if it comes as v and -v, since SiLU(v) - SiLU(-v) = v. Constant channels keep the norm's divisor steady.
The last convolution fits the rest by least squares.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pixel_unshuffle, silu, unfold

__all__ = ["begin", "silence"]

CONSTANT = 2.0
TENT = torch.tensor([0.25, 0.5, 0.25])


@torch.no_grad()
def begin(vae: Any, image: Tensor) -> None:
    """Initialise a VAE with one norm group, using images [B, 3, H, W] between -1 and 1."""
    for module in vae.modules():
        for branch in (getattr(module, "conv2", None), getattr(module, "to_out", [None])[0]):
            if branch is not None:
                silence(branch)
    _decoder(vae.decoder, _encoder(vae.encoder, image, vae.config.latent_channels), image)


def silence(layer: Any) -> None:
    """Set a layer to zero."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _encoder(encoder: Any, image: Tensor, channels: int) -> Tensor:
    """Collect a patch's pixels in channels, then take their principal components with unit variance."""
    *finer, last = encoder.down_blocks
    width = image.shape[1]
    _carry(encoder.conv_in, width)
    hidden = encoder.conv_in(image)
    for block in finer:
        _carry(block.resnets[0].conv_shortcut, width)
        for phase in range(4):
            _carry(block.downsamplers[0].conv, width, phase * width, (phase // 2, phase % 2))
        width *= 4
        hidden = block(hidden)
    pixels = _rows(pixel_unshuffle(image, 2 ** len(finer)))
    pixels = pixels - pixels.mean(0)
    components = pixels @ torch.linalg.svd(pixels, full_matrices=False).Vh[:channels].T
    components /= components.std(0)
    shortcut = last.resnets[0].conv_shortcut
    weight, bias = _fitted(_rows(hidden), components)
    _pairs(shortcut, weight[..., None, None], bias)
    hidden = silu(encoder.conv_norm_out(encoder.mid_block(last(hidden))))
    silence(encoder.conv_out)
    _fit(encoder.conv_out, hidden, components)
    latent: Tensor = encoder.conv_out(hidden)[:, :channels]
    return latent


def _decoder(decoder: Any, latent: Tensor, image: Tensor) -> None:
    """Interpolate the mean of each patch; the convolutions' random features stay in other channels."""
    colours = image.shape[1]
    _fit(decoder.conv_in, latent, _rows(avg_pool2d(image, image.shape[-1] // latent.shape[-1])))
    hidden = decoder.mid_block(decoder.conv_in(latent))
    for block in decoder.up_blocks:
        _carry(block.resnets[0].conv_shortcut, colours)
        if block.upsamplers:
            interpolate = block.upsamplers[0].conv
            _carry(interpolate, colours)
            for colour in range(colours):
                interpolate.weight[colour, colour] = TENT[:, None] * TENT
        else:
            shortcut = block.resnets[0].conv_shortcut
            _pairs(shortcut, shortcut.weight[:colours].clone(), shortcut.bias[:colours].clone(), steady=4)
        hidden = block(hidden)
    hidden = silu(decoder.conv_norm_out(hidden))
    around = unfold(hidden, 3, padding=1).transpose(1, 2).flatten(0, 1)
    weight, bias = _fitted(around, _rows(image))
    decoder.conv_out.weight.copy_(weight.unflatten(1, (-1, 3, 3)))
    decoder.conv_out.bias.copy_(bias)


def _carry(conv: Any, channels: int, to: int = 0, tap: tuple[int, int] | None = None) -> None:
    """Copy the first inputs to the outputs from `to` on, at a tap of the kernel or at its centre."""
    if conv is None:
        return
    row, column = tap or (conv.kernel_size[0] // 2, conv.kernel_size[1] // 2)
    conv.weight[to : to + channels] = 0
    conv.bias[to : to + channels] = 0
    conv.weight[to : to + channels, :channels, row, column] = torch.eye(channels)


def _fit(conv: Any, inputs: Tensor, targets: Tensor) -> None:
    """Fit the first outputs of a 3x3 convolution to the targets, using its centre only."""
    weight, bias = _fitted(_rows(inputs), targets)
    conv.weight[: len(weight)] = 0
    conv.weight[: len(weight), :, 1, 1] = weight
    conv.bias[: len(weight)] = bias


def _pairs(conv: Any, weight: Tensor, bias: Tensor, steady: int | None = None) -> None:
    """Set the first outputs to values and their opposites, and the last `steady`, or all others, to constants."""
    count = len(weight)
    conv.weight[: 2 * count] = torch.cat([weight, -weight])
    conv.bias[: 2 * count] = torch.cat([bias, -bias])
    constants = conv.out_channels - 2 * count if steady is None else steady
    conv.bias[-constants:] = CONSTANT * torch.tensor([1.0, -1.0]).repeat(constants)[:constants]


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).flatten(0, 2)


def _fitted(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The weight and bias that map input rows to target rows best."""
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1).double()
    squares = inputs.T @ inputs
    squares += 1e-6 * squares.trace() / len(squares) * torch.eye(len(squares), dtype=squares.dtype)
    solution = torch.linalg.solve(squares, inputs.T @ targets.double()).T.float()
    return solution[:, :-1], solution[:, -1]
