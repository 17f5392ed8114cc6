"""HiTokSR's networks against the specification's arithmetic, written out in float64, and its parameter counts."""

import numpy as np
import pytest
import torch
from torch import nn
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from support.hitoksr import Textbook, made, random, stem_by_name, tokens
from tilewright.export.networks.hitoksr import (
    Decode,
    Decoder,
    Encoder,
    Generate,
    Generator,
    HiTokConfig,
    Quantizer,
    VisionPrior,
    rope_tables,
    unpatch,
)
from tilewright.export.systems.hitoksr.sizes import PRESETS, sizes_of_networks
from tilewright.kernels.codebook import codewords

TINY = HiTokConfig(**sizes_of_networks(PRESETS["tiny"]))
# no two sizes alike, two class tokens, three levels of the stem and so a patch of 4, one head 16 wide
UNEVEN = HiTokConfig(
    dim=48,
    heads=3,
    depth=3,
    mlp_dim=40,
    patch_px=4,
    groups=3,
    codes=11,
    code_dim=5,
    stem=(6, 9, 12),
    stem_blocks=2,
    stem_norm_groups=3,
    class_layers=(1, 3),
    vision={
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "patch_size": 4,
        "num_register_tokens": 2,
    },
)
CONFIGS = pytest.mark.parametrize("config", [TINY, UNEVEN], ids=["tiny", "uneven"])


@pytest.fixture(autouse=True)
def _double():
    """Everything that is computed or made without a type is float64, tables of positions included."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# 2 x 3 patches: rows and columns differ; 1 x 4: no row to turn by; 1 x 1: a single patch
@CONFIGS
@pytest.mark.parametrize("grid", [(2, 3), (1, 4), (1, 1)], ids=str)
def test_the_generator_is_that_of_the_specification(config, grid):
    network = made(Generator(config))
    rows, columns = grid
    pixels = random(2, 3, rows * config.patch_px, columns * config.patch_px)
    patches = random(2, rows * columns, config.vision["hidden_size"], seed=2)
    class_tokens = random(2, len(config.class_layers), config.vision["hidden_size"], seed=3)
    codebook = random(config.groups, config.codes, config.code_dim, seed=4)

    textbook = Textbook(network, config)
    features = tokens(stem_by_name(network.state_dict(), config, pixels))
    projected = [
        textbook.linear(class_tokens[:, [i]].numpy(), f"cls.{i}") for i in range(len(config.class_layers))
    ]  # each by its own
    x = textbook.blocks(np.concatenate([*projected, features], 1), config.depth, columns, patches.numpy())
    hidden = textbook.rms_norm(x[:, len(config.class_layers) :], "norm")
    np.testing.assert_allclose(network.hidden(pixels, patches, class_tokens), hidden, rtol=0, atol=1e-10)

    indices, codes = network(pixels, patches, class_tokens, codebook)
    scores = textbook.linear(hidden, "head").reshape(2, rows * columns, config.groups, config.codes)
    assert indices.dtype == torch.int32
    np.testing.assert_array_equal(indices, scores.argmax(-1))
    for b, n, g in np.ndindex(scores.shape[:3]):
        mine = codes[b, n, g * config.code_dim : (g + 1) * config.code_dim]
        assert torch.equal(mine, codebook[g, int(scores[b, n, g].argmax())])


@CONFIGS
@pytest.mark.parametrize("grid", [(2, 3), (4, 1)], ids=str)
def test_the_decoder_is_that_of_the_specification(config, grid):
    network = made(Decoder(config))
    rows, columns = grid
    codes = random(2, config.latent_dim, rows, columns)
    textbook = Textbook(network, config)
    x = textbook.blocks(textbook.linear(tokens(codes), "embed"), config.depth, columns)
    values = textbook.linear(textbook.rms_norm(x, "norm"), "out")
    pixels = network(codes)
    assert pixels.shape == (2, 3, rows * config.patch_px, columns * config.patch_px)
    side = config.patch_px
    for b, c, y, x_px in np.ndindex(*pixels.shape):
        token = (y // side) * columns + x_px // side
        inside = ((y % side) * side + x_px % side) * 3 + c  # row, column, channel; the channel runs fastest
        assert abs(pixels[b, c, y, x_px] - values[b, token, inside]) <= 1e-10


@CONFIGS
def test_the_tokenizers_encoder_is_that_of_the_specification(config):
    network, side = made(Encoder(config)), config.patch_px
    pixels = random(2, 3, 2 * side, 3 * side)
    textbook = Textbook(network, config)
    kernel, bias = textbook.weights["embed.weight"], textbook.weights["embed.bias"]
    patches = [pixels[:, :, y : y + side, x : x + side] for y in (0, side) for x in (0, side, 2 * side)]
    x = np.stack([np.einsum("bcyx,ocyx->bo", patch, kernel) + bias for patch in patches], 1)
    x = textbook.blocks(x, config.depth, 3)
    np.testing.assert_allclose(
        network(pixels), textbook.linear(textbook.rms_norm(x, "norm"), "out"), rtol=0, atol=1e-10
    )


def test_positions_are_those_of_the_formula():
    rows, columns, width = 3, 5, 16
    cos, sin = rope_tables(rows, columns, width, torch.device("cpu"))
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        turns = [10_000 ** (-4 * i / width) for i in range(width // 4)]
        angles = [place * turn for place in (row, column) for turn in turns]
        np.testing.assert_allclose(cos[token], np.cos(angles), rtol=0, atol=1e-14)
        np.testing.assert_allclose(sin[token], np.sin(angles), rtol=0, atol=1e-14)


def test_positions_in_float32_stay_within_a_rounding_of_the_angle():
    torch.set_default_dtype(torch.float32)
    cos, sin = rope_tables(512, 2, 64, torch.device("cpu"))  # 8192 px, the largest side an engine takes
    assert (cos.dtype, sin.dtype) == (torch.float32, torch.float32)
    angles = np.arange(512)[:, None] * 10_000.0 ** -(np.arange(16) / 16)
    # the frequency and its product with the place are each rounded by half an ulp, and so is the cosine
    atol = 512 * np.finfo(np.float32).eps + 1e-7
    np.testing.assert_allclose(cos[::2, :16], np.cos(angles), rtol=0, atol=atol)
    np.testing.assert_allclose(sin[::2, :16], np.sin(angles), rtol=0, atol=atol)


@pytest.mark.parametrize("width", [4, 64, 196])  # one frequency; the full preset; 1 / (4 / 196) is more than 49
def test_there_are_as_many_angles_as_pairs_of_channels_at_any_width_of_a_head(width):
    assert rope_tables(2, 3, width, torch.device("cpu"))[0].shape == (6, width // 2)


def test_unpatching_is_a_depth_to_space_whose_channel_runs_fastest():
    values = torch.arange(2 * 2 * 4 * 4 * 3, dtype=torch.float64).reshape(1, 4, 48)
    pixels = unpatch(values, 2, 2, 4)
    for c, y, x in np.ndindex(3, 8, 8):
        assert pixels[0, c, y, x] == values[0, (y // 4) * 2 + x // 4, ((y % 4) * 4 + x % 4) * 3 + c]


@CONFIGS
@pytest.mark.parametrize("grid", [(2, 3), (3, 3), (1, 2)], ids=str)
def test_the_vision_prior_reads_what_transformers_gives(config, grid):
    prior = made(VisionPrior(config))
    side = config.vision["patch_size"]
    pixels = random(2, 3, grid[0] * side, grid[1] * side)
    model = DINOv3ViTModel(DINOv3ViTConfig(**config.vision)).double().eval()
    left = model.load_state_dict(prior.vfm.state_dict(), strict=False)
    assert left.missing_keys == ["embeddings.mask_token"] and not left.unexpected_keys  # which only training reads
    with torch.no_grad():
        read = model(pixels, output_hidden_states=True)
    assert len(read.hidden_states) == config.vision["num_hidden_layers"] + 1
    patches, class_tokens = prior(pixels)
    first = 1 + config.vision["num_register_tokens"]
    np.testing.assert_allclose(patches, read.last_hidden_state[:, first:], rtol=0, atol=1e-12)
    assert class_tokens.shape == (2, len(config.class_layers), config.vision["hidden_size"])
    for i, layer in enumerate(config.class_layers):
        expected = model.norm(read.hidden_states[layer][:, 0]).detach()
        np.testing.assert_allclose(class_tokens[:, i], expected, rtol=0, atol=1e-12)


def test_the_eye_sees_imagenets_range_and_the_stem_minus_one_to_one():
    network, seen = made(Generate(TINY)), {}
    network.vision.register_forward_pre_hook(lambda _, inputs: seen.update(eye=inputs[0]))
    network.generator.stem.register_forward_pre_hook(lambda _, inputs: seen.update(stem=inputs[0]))
    image = random(2, 3, 32, 16).sigmoid()
    codes, indices = network(image)
    assert (codes.shape, indices.shape, indices.dtype) == ((2, 8, 2, 1), (2, 4, 2, 1), torch.int32)
    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for c in range(3):
        np.testing.assert_allclose(seen["eye"][:, c], (image[:, c] - mean[c]) / deviation[c], rtol=0, atol=1e-12)
        np.testing.assert_allclose(seen["stem"][:, c], image[:, c] * 2 - 1, rtol=0, atol=1e-12)


def test_the_grid_of_codes_is_row_major_and_its_groups_lie_side_by_side():
    network = made(Generate(TINY))
    image = random(1, 3, 32, 48).sigmoid()
    codes, indices = network(image)
    prior = network.vision((image - network.mean) / network.deviation)
    flat, values = network.generator(image * 2 - 1, *prior, network.quantizer.codebook)
    assert len(set(map(tuple, flat[0].tolist()))) > 1
    for y, x in np.ndindex(2, 3):
        assert torch.equal(indices[0, :, y, x], flat[0, y * 3 + x])
        assert torch.equal(codes[0, :, y, x], values[0, y * 3 + x])
        assert torch.equal(codes[0, :, y, x], codewords(flat[0, y * 3 + x], network.quantizer.codebook))


def test_winners_are_those_of_a_search_through_all_scores():
    network = made(Generate(TINY))
    image = random(2, 3, 48, 32).sigmoid()
    scores, best = network.winners(image)
    assert (scores.shape, best.shape) == ((2, 4, 3, 2, 2), (2, 4, 3, 2))
    prior = network.vision((image - network.mean) / network.deviation)
    logits = network.generator.head(network.generator.hidden(image * 2 - 1, *prior))
    for b, g, y, x in np.ndindex(*best.shape):
        mine = logits[b, y * 2 + x, g * TINY.codes : (g + 1) * TINY.codes].tolist()
        assert best[b, g, y, x] == mine.index(max(mine))
        np.testing.assert_allclose(scores[b, g, y, x], sorted(mine)[:-3:-1], rtol=0, atol=1e-12)
    assert torch.equal(best.int(), network(image)[1])


def test_the_picture_is_half_of_the_decoders_range_plus_a_half_and_clipped():
    network = made(Decode(TINY))
    codes = random(2, 8, 2, 3)
    raw, image = network.decoder(codes), network(codes)
    assert bool((raw < -1).any()) and bool((raw > 1).any()) and bool((raw.abs() < 1).any())  # every case occurs
    np.testing.assert_allclose(image, np.clip((raw.numpy() + 1) / 2, 0, 1), rtol=0, atol=1e-15)


@CONFIGS
@pytest.mark.parametrize("grid", [(1, 1), (2, 3)], ids=str)
def test_pixels_come_back_in_their_shape_from_the_tokenizer(config, grid):
    encoder, quantizer, decoder = (made(network(config)) for network in (Encoder, Quantizer, Decoder))
    pixels = random(2, 3, grid[0] * config.patch_px, grid[1] * config.patch_px)
    latents = encoder(pixels)
    indices, codes = quantizer(latents)
    assert latents.shape == codes.shape == (2, grid[0] * grid[1], config.latent_dim)
    assert indices.shape == (2, grid[0] * grid[1], config.groups)
    assert decoder(codes.transpose(1, 2).unflatten(2, grid)).shape == pixels.shape


def test_the_generator_and_the_tokenizer_mean_the_same_codewords_by_an_index():
    generator, quantizer = made(Generator(TINY)), made(Quantizer(TINY))
    _, codes = generator(random(1, 3, 32, 32), random(1, 4, 32), random(1, 4, 32), quantizer.codebook)
    indices, again = quantizer(codes)
    assert torch.equal(again, codes)
    assert torch.equal(codewords(indices, quantizer.codebook), codes)


@CONFIGS
def test_groups_from_the_masked_one_on_are_zero_and_the_others_stay(config):
    quantizer = made(Quantizer(config))
    latents = random(2, 5, config.latent_dim)
    indices, whole = quantizer(latents)
    assert bool((whole != 0).all())
    for active in range(config.groups + 1):
        some_indices, codes = quantizer(latents, active)
        kept = active * config.code_dim
        assert torch.equal(some_indices, indices)
        assert torch.equal(codes[..., :kept], whole[..., :kept])
        assert not codes[..., kept:].any()
    assert torch.equal(quantizer(latents, config.groups)[1], whole)


@pytest.fixture(scope="module")
def full() -> dict[str, nn.Module]:
    """The networks of the full preset without storage."""
    with torch.device("meta"):
        return {name: kind(HiTokConfig()) for name, kind in (("generate", Generate), ("decode", Decode))}


def millions(module: nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def test_the_full_preset_has_the_papers_number_of_parameters(full):
    assert HiTokConfig() == HiTokConfig(**sizes_of_networks(PRESETS["full"]))
    total = millions(full["generate"]) + millions(full["decode"])
    assert total == pytest.approx(339.09, abs=0.005)  # the specification's own count
    assert total == pytest.approx(339.0, rel=1e-3)  # the paper's


def test_the_parts_of_the_full_preset_have_the_specifications_numbers_of_parameters(full):
    counts = {
        "generator": (full["generate"].generator, 167.73),
        "stem": (full["generate"].generator.stem, 39.47),
        "decoder": (full["decode"], 85.57),
        "codebook": (full["generate"].quantizer, 0.13),
        "vision": (full["generate"].vision, 85.66),
    }
    assert {name: round(millions(module), 2) for name, (module, _) in counts.items()} == {
        name: count for name, (_, count) in counts.items()
    }


def test_the_tiny_vision_model_has_the_specifications_number_of_parameters():
    assert sum(p.numel() for p in VisionPrior(TINY).parameters()) == 59_168 - 32  # without the mask token


def test_attention_and_swiglu_have_no_biases_and_everything_else_has(full):
    names = [name for network in full.values() for name, _ in network.named_parameters() if ".vfm." not in name]
    for kind in ("sft1", "sft2", "cls.0", "head", "stem.0", "embed", "out"):
        assert any(name.endswith(f".{kind}.bias") for name in names), kind
    for kind in ("to_q", "to_k", "to_v", "to_out", "gate", "up", "down"):
        assert any(name.endswith(f".{kind}.weight") for name in names)
        assert not any(name.endswith(f".{kind}.bias") for name in names), kind
    assert {name.split(".")[0] for name in names} == {"generator", "quantizer", "decoder"}
