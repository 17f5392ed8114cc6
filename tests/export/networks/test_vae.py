"""The two halves of the VAE against diffusers' class."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

from support.random_networks import distance, made, random
from tilewright.export.networks import vae as vae_networks
from tilewright.export.networks.vae import Decode, Encode
from tilewright.export.systems.flux.sizes import PRESETS

SIZES = PRESETS["tiny"]
CHANNELS, SPATIAL = SIZES.channels, SIZES.spatial
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    network = made(AutoencoderKL(**SIZES.vae))
    network.decoder.conv_out.weight.mul_(4)  # so that values are beyond the range of images, on both sides
    return network


def half(vae: AutoencoderKL, which: str, **of_diptych) -> nn.Module:
    network = {"encoder": Encode, "decoder": Decode}[which](SIZES.vae, **of_diptych)
    network.load_state_dict({k: v for k, v in vae.state_dict().items() if k.startswith(which)})
    return network.eval().requires_grad_(False)


def encoded(vae: AutoencoderKL, canvas: Tensor) -> Tensor:
    mean = vae.encode(canvas).latent_dist.mean
    return (mean - vae.config.shift_factor) * vae.config.scaling_factor


def decoded(vae: AutoencoderKL, latent: Tensor) -> Tensor:
    raw = vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
    assert bool((raw < -1).any()) and bool((raw > 1).any()) and bool((raw.abs() < 1).any())  # every case occurs
    return (raw / 2 + 0.5).clamp(0, 1)


# pixels; the latent's tokens are fewer than the chunks of queries, as many, more, and no multiple of them
PICTURES = pytest.mark.parametrize(
    "size", [(1, 8, 12), (2, 8, 16), (1, 20, 4), (2, 12, 28), (1, 36, 20), (1, 2, 2)], ids=str
)


@PICTURES
def test_an_image_is_encoded_as_the_scaled_mean(vae, size):
    batch, height, width = size
    image = random(batch, 3, height, width).sigmoid()
    latent = half(vae, "encoder")(image)
    assert latent.shape == (batch, CHANNELS, height // SPATIAL, width // SPATIAL)
    assert distance(latent, encoded(vae, image * 2 - 1)) <= 1e-5


@PICTURES
def test_a_diptych_is_encoded_beside_mid_grey(vae, size):
    batch, height, width = size
    image = random(batch, 3, height, width).sigmoid()
    canvas = torch.zeros(batch, 3, height, 2 * width)
    canvas[..., :width] = image * 2 - 1
    assert distance(half(vae, "encoder", diptych=True)(image), encoded(vae, canvas)) <= 1e-5


# latents; 3 x 5 and 7 x 11 have odd sides
SHAPES = [(1, 4, 6), (2, 4, 8), (1, 3, 5), (2, 7, 11), (1, 12, 20)]


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_a_latent_is_decoded_to_the_unit_interval(vae, size):
    batch, height, width = size
    latent = random(batch, CHANNELS, height, width)
    image = half(vae, "decoder")(latent)
    assert image.shape == (batch, 3, height * SPATIAL, width * SPATIAL)
    torch.testing.assert_close(image, decoded(vae, latent), rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [None, 0, 2, 3, 100])
@pytest.mark.parametrize("size", [(1, 4, 8), (2, 6, 12), (1, 5, 14), (1, 8, 6)], ids=str)
def test_of_a_diptych_the_right_panel_is_decoded_from_its_columns_and_the_margins(vae, size, margin):
    batch, height, width = size
    latent = random(batch, CHANNELS, height, width)
    image = half(vae, "decoder", diptych=True, margin=margin)(latent)
    assert image.shape == (batch, 3, height * SPATIAL, width // 2 * SPATIAL)
    first = 0 if margin is None else max(width // 2 - margin, 0)
    expected = decoded(vae, latent[..., first:])[..., -(width // 2) * SPATIAL :]
    torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("margin", [4, 5, 16])
def test_a_margin_of_a_panel_or_more_is_the_whole_canvas(vae, margin):
    latent = random(2, CHANNELS, 6, 8)
    whole = half(vae, "decoder", diptych=True)(latent)
    assert torch.equal(half(vae, "decoder", diptych=True, margin=margin)(latent), whole)
    cut = half(vae, "decoder", diptych=True, margin=1)(latent)
    assert 1e-4 < float((cut - whole).abs().mean()) < 0.1  # less than a panel is another picture, not much another


# 32 chunks: tokens below, at, above and far above, multiples or not
@pytest.mark.parametrize("grid", [(1, 1), (1, 31), (4, 8), (3, 11), (6, 6), (5, 13), (8, 12), (17, 19)], ids=str)
@pytest.mark.parametrize("which", ["encoder", "decoder"])
def test_chunked_attention_is_the_librarys_and_holds_no_full_score_matrix(vae, monkeypatch, which, grid):
    height, width = grid
    attention = half(vae, which).get_submodule(f"{which}.mid_block.attentions.0")
    theirs = getattr(vae, which).mid_block.attentions[0]
    theirs.set_processor(AttnProcessor2_0())
    x = random(2, SIZES.vae["block_out_channels"][-1], height, width)
    expected = theirs(x)
    lengths = []
    attend = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F,
        "scaled_dot_product_attention",
        lambda q, k, v, **kw: lengths.append((q.shape[-2], k.shape[-2], v.shape[-2])) or attend(q, k, v, **kw),
    )
    ours = attention(x)
    tokens = height * width
    part = math.ceil(tokens / vae_networks.QUERY_CHUNKS)
    assert max(queries for queries, _, _ in lengths) == part
    assert sum(queries for queries, _, _ in lengths) >= tokens
    assert {(keys, values) for _, keys, values in lengths} == {(tokens, tokens)}
    assert distance(ours - x, expected - x) <= 1e-5
