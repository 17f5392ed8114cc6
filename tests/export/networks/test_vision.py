"""Vision encoders against Pillow, the published processors and the bare library classes; their graphs against eager."""

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from PIL import Image
from torch import nn
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from support.lazily import Lazily
from tilewright.export.networks.vision import Bridge, ClipVision, DinoPositions, Redux, Siglip, resize_matrix, resized
from tilewright.export.system import ComponentSpec
from tilewright.runtime.bundle.program import TensorSpec

SIDE = 28
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
}
CLIP = SIGLIP | {"projection_dim": 16}
CPU = torch.device("cpu")
BICUBIC = Image.Resampling.BICUBIC


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def by_pillow(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    """A plane [H, W] of floats resized by Pillow, which does not round in mode F."""
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((width, height), BICUBIC))


def tensor(image: Image.Image) -> torch.Tensor:
    """An 8-bit image as [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None]


def made(network: nn.Module, seed: int = 0) -> nn.Module:
    """The network with weights of order one everywhere, so that no term is too small to be missed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            fan_in = math.prod(parameter.shape[1:]) if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return network.eval().requires_grad_(False)


# shrunk, enlarged, kept, by little and by much, to and from a single sample
@pytest.mark.parametrize(
    "sizes", [(100, 28), (28, 100), (28, 28), (29, 28), (27, 28), (301, 3), (2, 28), (1, 5), (5, 1)], ids=str
)
def test_the_matrix_is_pillows(sizes):
    length, size = sizes
    weights = by_pillow(np.eye(length), length, size).T  # what Pillow makes of each sample alone
    np.testing.assert_allclose(resize_matrix(length, size, 0, size, CPU), weights, rtol=0, atol=1e-6)


# the last are so far from zero that a position in float32 is off by more than the tolerance
@pytest.mark.parametrize(
    "window", [(100, 40, 0, 28), (90, 41, 6, 28), (28, 200, 172, 28), (9000, 384, 356, 28), (9001, 20001, 19970, 28)]
)
def test_a_window_of_the_matrix_is_that_part_of_pillows_result(window):
    length, size, start, count = window
    row = rng().random((1, length))
    whole = by_pillow(row, 1, size)[0]
    part = resize_matrix(length, size, start, count, CPU) @ torch.from_numpy(row[0]).float()
    np.testing.assert_allclose(part, whole[start : start + count], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "sizes", [(90, 120, 28, 28), (9, 20, 30, 28), (90, 11, 28, 29), (12, 140, 27, 28), (28, 28, 28, 28)], ids=str
)
def test_an_image_is_resized_as_by_pillow(sizes):
    height, width, rows, columns = sizes
    image = rng().uniform(0.3, 0.7, (2, 3, height, width))  # nothing overshoots
    matrices = resize_matrix(height, rows, 0, rows, CPU), resize_matrix(width, columns, 0, columns, CPU)
    ours = resized(torch.from_numpy(image).float(), *matrices)
    assert ours.shape == (2, 3, rows, columns)
    for b, c in np.ndindex(2, 3):
        np.testing.assert_allclose(ours[b, c], by_pillow(image[b, c], rows, columns), rtol=0, atol=1e-5)


def test_each_pass_is_clamped_and_the_horizontal_one_is_first():
    image = (rng().random((13, 17)) > 0.5).astype(np.float32)
    matrices = resize_matrix(13, SIDE, 0, SIDE, CPU), resize_matrix(17, SIDE, 0, SIDE, CPU)
    ours = resized(torch.from_numpy(image)[None, None], *matrices)[0, 0].numpy()
    expected = by_pillow(by_pillow(image, 13, SIDE).clip(0, 1), SIDE, SIDE).clip(0, 1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    at_the_end = by_pillow(image, SIDE, SIDE).clip(0, 1)
    other_way = by_pillow(by_pillow(image, SIDE, 17).clip(0, 1), SIDE, SIDE).clip(0, 1)
    assert min(abs(ours - at_the_end).max(), abs(ours - other_way).max()) > 0.02  # it is this order that is tested


SIGLIP_PROCESSOR = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
CLIP_PROCESSOR = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
# (50, 64): 28 * 64 / 50 = 35.84, rounded down; (50, 63): 35, so the crop starts at 3.5, rounded down; their transposes;
# one side enlarged, one shrunk; both enlarged; nothing to do; long. None is tall: from version 13 on, Pillow shrinks
# a tall image vertically first, which the encoders' training did not see
PICTURES = pytest.mark.parametrize(
    "size", [(50, 64), (64, 50), (50, 63), (63, 50), (17, 90), (9, 13), (28, 28), (31, 300)], ids=str
)


def picture(size: tuple[int, int], contrast: str) -> Image.Image:
    """Noise, of full range or in black and white only."""
    pixels = rng(size[0]).integers(0, 256, (*size, 3))
    return Image.fromarray((pixels if contrast == "grey" else (pixels > 127) * 255).astype(np.uint8))


@PICTURES
@pytest.mark.parametrize("contrast", ["grey", "black and white"])
@pytest.mark.parametrize("which", ["siglip", "clip"])
def test_pixels_are_those_of_the_published_processor(which, contrast, size):
    network, processor = (Siglip(SIGLIP), SIGLIP_PROCESSOR) if which == "siglip" else (ClipVision(CLIP), CLIP_PROCESSOR)
    image = picture(size, contrast)
    expected = processor(image, return_tensors="np")["pixel_values"]
    ours = network.pixels(tensor(image)).numpy()
    assert ours.shape == expected.shape == (1, 3, SIDE, SIDE)
    error = abs(ours - expected) * np.reshape(processor.image_std, (3, 1, 1)) * 255
    # the processor rounds twice, and the second pass weighs the first's rounding by up to 1.3
    assert error.max() <= 1.5
    assert error.mean() <= 0.5


@pytest.mark.parametrize("size", [(90, 17), (300, 31)], ids=str)
def test_of_a_tall_picture_only_the_order_of_the_passes_may_differ(size):
    image = picture(size, "black and white")
    expected = SIGLIP_PROCESSOR(image, return_tensors="np")["pixel_values"]
    network, turned = Siglip(SIGLIP), tensor(image).transpose(2, 3)
    orders = network.pixels(tensor(image)), network.pixels(turned).transpose(2, 3)
    assert min(abs(pixels.numpy() - expected).max() for pixels in orders) * 127.5 <= 1.5


@pytest.mark.parametrize("which", ["siglip", "clip"])
def test_other_means_deviations_and_sides_are_those_of_a_processor_that_has_them(which):
    numbers = {"image_mean": [0.3, 0.5, 0.65], "image_std": [0.2, 0.5, 1.5]}
    taken = {"mean": numbers["image_mean"], "deviation": numbers["image_std"]}
    side = {"height": SIDE, "width": SIDE}
    if which == "siglip":
        network, processor = Siglip(SIGLIP, **taken), SiglipImageProcessorPil(size=side, **numbers)
    else:
        network = ClipVision(CLIP, short=41, **taken)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 41}, crop_size=side, **numbers)
    image = picture((50, 64), "grey")
    expected, ours = processor(image, return_tensors="np")["pixel_values"], network.pixels(tensor(image)).numpy()
    error = abs(ours - expected) * np.reshape(processor.image_std, (3, 1, 1)) * 255
    assert error.max() <= 1.5 and error.mean() <= 0.5


def test_siglips_usual_pixels_are_twice_the_image_less_one():
    image = torch.rand(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(
        Siglip(SIGLIP).pixels(image), resized(image, *[resize_matrix(SIDE, SIDE, 0, SIDE, CPU)] * 2) * 2 - 1
    )


def test_the_siglip_encoder_is_the_bare_class_without_its_pooling():
    bare = made(SiglipVisionModel(SiglipVisionConfig(**SIGLIP, attn_implementation="eager")))
    network = Siglip(SIGLIP).eval()
    left = network.model.load_state_dict(bare.state_dict(), strict=False)
    assert not left.missing_keys
    assert left.unexpected_keys
    assert all(key.startswith("head.") for key in left.unexpected_keys)
    image = tensor(picture((40, 61), "grey"))
    with torch.no_grad():
        ours, expected = network(image), bare(network.pixels(image)).last_hidden_state
    assert ours.shape == (1, 4, 32)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_the_clip_encoder_is_the_bare_class():
    bare = made(CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP, attn_implementation="eager")))
    network = ClipVision(CLIP).eval()
    assert set(network.state_dict()) == {f"model.{key}" for key in bare.state_dict()}
    network.model.load_state_dict(bare.state_dict())
    image = tensor(picture((40, 61), "grey"))
    with torch.no_grad():
        ours, expected = network(image), bare(network.pixels(image)).image_embeds
    assert ours.shape == (1, 16)
    assert abs(ours.norm() - 1) > 0.1  # not normalised
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("release", [True, False], ids=["release", "current"])
def test_dinos_positions_that_fit_stay_as_they_are(release):
    config = {key: SIGLIP[key] for key in SIGLIP if key != "intermediate_size"}
    positions = made(DinoPositions(config, SIDE, release=release))
    assert torch.equal(positions(), positions.position_embeddings)


def test_redux_is_the_bare_class_and_widens_threefold_between():
    network, bare = Redux(12, 20).eval(), made(ReduxImageEncoder(redux_dim=12, txt_in_features=20))
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert shapes == {
        "model.redux_up.weight": (60, 12),
        "model.redux_up.bias": (60,),
        "model.redux_down.weight": (20, 60),
        "model.redux_down.bias": (20,),
    }
    network.model.load_state_dict(bare.state_dict())
    features = torch.from_numpy(rng().standard_normal((2, 4, 12), np.float32))
    with torch.no_grad():
        ours = network(features).double().numpy()
    up_w, up_b, down_w, down_b = (bare.state_dict()[name[6:]].double().numpy() for name in shapes)
    hidden = features.double().numpy() @ up_w.T + up_b
    np.testing.assert_allclose(ours, hidden / (1 + np.exp(-hidden)) @ down_w.T + down_b, rtol=0, atol=1e-5)


def test_the_bridge_is_that_of_the_formula():
    network = made(Bridge(6, 10, 4).double())
    weights = {name: tensor.numpy() for name, tensor in network.state_dict().items()}
    assert {name: array.shape for name, array in weights.items()} == {
        "norm.weight": (6,),
        "norm.bias": (6,),
        "fc1.weight": (10, 6),
        "fc1.bias": (10,),
        "fc2.weight": (4, 10),
        "fc2.bias": (4,),
        "scale": (),
    }
    assert abs(weights["scale"] - 1) > 0.1
    embeds = rng().standard_normal((3, 6)) * 0.01  # so small that the epsilon of the norm counts
    centred = embeds - embeds.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    hidden = (normed * weights["norm.weight"] + weights["norm.bias"]) @ weights["fc1.weight"].T + weights["fc1.bias"]
    active = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    expected = weights["scale"] * (active @ weights["fc2.weight"].T + weights["fc2.bias"])
    np.testing.assert_allclose(network(torch.from_numpy(embeds)), expected, rtol=0, atol=1e-12)


IMAGE = {"image": TensorSpec("float32", ("batch", 3, "height", "width"))}
EMBEDS = {"embeds": TensorSpec("float32", ("batch", 16))}
FEATURES = {"features": TensorSpec("float32", ("batch", "tokens", 32))}
SOURCES = {
    "siglip": (lambda: Siglip(SIGLIP), IMAGE, {"features": TensorSpec("float32", ("batch", 4, 32))}, {}),
    "clip": (lambda: ClipVision(CLIP), IMAGE, EMBEDS, {}),
    "clip of tiles": (lambda: ClipVision(CLIP), IMAGE, EMBEDS, {"height": 16, "width": 16}),
    "redux": (lambda: Redux(32, 24), FEATURES, {"tokens": TensorSpec("float32", ("batch", "tokens", 24))}, {}),
    "bridge": (lambda: Bridge(16, 24, 12), EMBEDS, {"pooled": TensorSpec("float32", ("batch", 12))}, {}),
}


@pytest.fixture(scope="module")
def networks(tmp_path_factory, opened) -> dict[str, Any]:
    """Every network, traced when it is first used."""

    def open_it(name: str) -> Any:
        module, inputs, outputs, multiples = SOURCES[name]
        return opened(ComponentSpec(module, inputs, outputs, {}, multiples), tmp_path_factory.mktemp("network"))

    return Lazily(open_it)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_the_graph_needs_each_parameter_and_has_plain_operators(networks, name):
    model, _, eager = networks[name]
    outside = {n for n, v in model.graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert outside == {n for n, _ in eager.named_parameters()}
    nodes = list(model.graph.all_nodes())
    assert {node.domain for node in nodes} == {""}
    types = [node.op_type for node in nodes]
    assert "Resize" not in types
    assert types.count("Attention") == (2 if name in ("siglip", "clip", "clip of tiles") else 0)


def assert_runs_as_eager(network: Any, name: str, array: np.ndarray) -> None:
    expected = network.eager(torch.from_numpy(array)).double().numpy()
    assert expected.std() > 0.1
    for engine in network.engines:
        (wanted,) = [value.name for value in network.model.graph.outputs]
        ours = engine.run({name: array}, [wanted])[wanted]
        assert ours.shape == expected.shape
        # float32 sums in another order; measured 2e-6
        assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


# shrunk, enlarged, one of each, square, and the example's own size, which the exporter saw
@pytest.mark.slow
@pytest.mark.parametrize(
    "size", [(1, 90, 40), (2, 31, 77), (3, 9, 13), (1, 12, 200), (1, 28, 28), (2, 3, 4), (1, 1, 1)], ids=str
)
@pytest.mark.parametrize("name", ["siglip", "clip"])
def test_the_graph_sees_images_of_any_size_as_eager_pytorch_does(networks, name, size):
    batch, height, width = size
    assert_runs_as_eager(networks[name], "image", rng(height).random((batch, 3, height, width), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(2, 64, 48), (1, 16, 160), (1, 48, 64), (1, 16, 16)], ids=str)
def test_sizes_may_be_multiples(networks, size):
    batch, height, width = size
    assert_runs_as_eager(networks["clip of tiles"], "image", rng(height).random((batch, 3, height, width), np.float32))


@pytest.mark.slow
def test_the_crop_is_where_eager_pytorch_has_it_at_every_remainder(networks):
    for width in range(50, 90):
        for shape in ((1, 3, 50, width), (1, 3, width, 50)):
            assert_runs_as_eager(networks["clip"], "image", rng(width).random(shape, np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_the_projections_run_as_eager_pytorch_does(networks, batch):
    assert_runs_as_eager(networks["redux"], "features", rng().standard_normal((batch, 5, 32), np.float32))
    assert_runs_as_eager(networks["bridge"], "embeds", rng().standard_normal((batch, 16), np.float32))
