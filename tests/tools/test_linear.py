"""A VAE that begins as a linear one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from train import data, linear

from tilewright.export.systems.flux.sizes import PRESETS

CHANNELS = PRESETS["demo"].channels


@pytest.fixture(scope="module")
def image() -> Tensor:
    made = [data.polygons(data.random(7, i))[:64, :64] for i in range(6)]
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2).float() * 2 - 1


@pytest.fixture(scope="module")
def vae(image) -> Iterator[Any]:
    torch.manual_seed(0)
    made = AutoencoderKL(**PRESETS["demo"].vae)
    linear.begin(made, image)
    with torch.no_grad():
        yield made


def test_latents_are_the_principal_components_of_patches(vae, image):
    patches = image.numpy().reshape(6, 3, 16, 4, 16, 4).transpose(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    centred = patches - patches.mean(0)
    values, vectors = np.linalg.eigh(centred.T @ centred / (len(centred) - 1))
    expected = centred @ vectors[:, ::-1][:, :CHANNELS] / np.sqrt(values[::-1][:CHANNELS])
    found = vae.encoder(image)[:, :CHANNELS].permute(0, 2, 3, 1).flatten(0, 2).numpy()
    for k in range(CHANNELS):  # a component's sign is nobody's choice
        assert abs(np.corrcoef(found[:, k], expected[:, k])[0, 1]) > 0.97
    assert np.allclose(found.std(0), 1, atol=0.05)


def test_what_comes_back_is_nearer_than_the_patches_means(vae, image):
    again = vae.decoder(vae.encoder(image)[:, :CHANNELS])
    means = torch.nn.functional.avg_pool2d(image, 4)
    flat = torch.nn.functional.interpolate(means, scale_factor=4, mode="bilinear")
    assert (again - image).square().mean() < 0.8 * (flat - image).square().mean()
