"""GroupNormalization as two reductions, a scale and a shift, against PyTorch's in float64."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from tilewright.export.graph.rewrites.group_norm import group_norm

EPS32 = float(np.finfo(np.float32).eps)


def graph(channels: int, groups: int, epsilon: str = ", epsilon = 0.00001", last: bool = True) -> ir.Model:
    """One normalization, alone or between two other operators."""
    body = (
        f"y = GroupNormalization <num_groups = {groups}{epsilon}> (x, weight, bias)"
        if last
        else f"""
            a = Neg (x)
            b = GroupNormalization <num_groups = {groups}{epsilon}> (a, weight, bias)
            c = Sigmoid (b)
            y = Mul (b, c)"""
    )
    generator = np.random.default_rng(channels)
    weight, bias = (", ".join(f"{v:.6f}" for v in generator.normal(size=channels)) for _ in range(2))
    return ir.from_proto(
        onnx.parser.parse_model(
            f"""
            <ir_version: 10, opset_import: ["" : 23]>
            g (float[n, {channels}, h, w] x) => (float[n, {channels}, h, w] y)
            <float[{channels}] weight = {{{weight}}}, float[{channels}] bias = {{{bias}}}> {{ {body} }}
            """
        )
    )


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    return y


def affine(model: ir.Model) -> tuple[torch.Tensor, torch.Tensor]:
    values = (model.graph.initializers[name].const_value.numpy() for name in ("weight", "bias"))
    return tuple(torch.from_numpy(value.copy()) for value in values)


def exact(model: ir.Model, x: np.ndarray, groups: int, epsilon: float = 1e-5) -> np.ndarray:
    weight, bias = (t.double() for t in affine(model))
    return torch.nn.functional.group_norm(torch.from_numpy(x).double(), groups, weight, bias, epsilon).numpy()


def rewritten(model: ir.Model) -> ir.Model:
    assert group_norm(model) == 1
    assert "GroupNormalization" not in {node.op_type for node in model.graph}
    return model


def pixels(*shape: int, mean: float = 0.0, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=shape) + mean).astype(np.float32)


SHAPES = {
    "several groups": ((1, 8, 5, 7), 4),
    "a batch": ((3, 6, 4, 4), 3),
    "a group for every channel": ((2, 5, 6, 3), 5),
    "one group for all channels": ((2, 7, 3, 4), 1),
    "one channel": ((2, 1, 4, 5), 1),
    "one row": ((2, 8, 1, 9), 2),
    "two values a group": ((2, 2, 1, 2), 2),
    "as large as in the stem": ((1, 64, 96, 80), 32),
}


@pytest.mark.parametrize(("shape", "groups"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_the_answer_is_pytorchs(shape, groups, mean):
    x = pixels(*shape, mean=mean)
    model = graph(shape[1], groups)
    before, after = run(model, x), run(rewritten(model), x)
    reference = exact(model, x, groups)
    grouped = x.astype(np.float64).reshape(shape[0], groups, -1)
    # E[x^2] and mean^2 are each rounded a few times to eps of themselves; the variance is their difference, and of its
    # relative error y - bias takes half
    spread = (np.mean(grouped**2, -1) / (np.var(grouped, -1) + 1e-5)).max()
    scaled = np.abs(reference - affine(model)[1].numpy()[:, None, None]).max()
    np.testing.assert_allclose(after, reference, rtol=0, atol=4 * EPS32 * (1 + spread) * scaled + 1e-6)
    # the operator's own body, where it runs as one, takes the same difference over sums of whole groups
    np.testing.assert_allclose(after, before, rtol=0, atol=32 * EPS32 * (1 + spread) * scaled + 1e-6)


@pytest.mark.parametrize("mean", [0.0, 1.0, 3.0])
def test_an_image_as_large_as_a_tile_is_as_exact_as_a_small_one(mean):
    x = pixels(1, 4, 512, 512, mean=mean)
    model = rewritten(graph(4, 2))
    reference = exact(model, x, 2)
    error = np.linalg.norm(run(model, x) - reference) / np.linalg.norm(reference)
    # measured 1e-7, 3e-7, 2e-6; with one running sum over a group it was 6e-5 and more
    assert error <= 4 * EPS32 * (1 + mean**2)


@pytest.mark.parametrize("value", [0.0, 0.3, -7.3, 123.4, 1000.3])  # of most, the square is rounded
def test_a_constant_image_gives_numbers(value):
    model = rewritten(graph(6, 3))
    x = np.full((2, 6, 16, 16), value, np.float32)
    y = run(model, x)
    assert np.isfinite(y).all()
    # the variance is 0 or, where it would come out below, held at 0: at worst 1/sqrt(eps) of the mean's own rounding
    weight, bias = (t.numpy()[:, None, None] for t in affine(model))
    assert np.abs(y - bias).max() <= 4 * EPS32 * abs(value) / 1e-5**0.5 * np.abs(weight).max() + 1e-6


def test_images_of_a_batch_do_not_mix():
    model = rewritten(graph(8, 2))
    x = pixels(3, 8, 5, 6) * np.array([1, 100, 0.01], np.float32)[:, None, None, None]
    together = run(model, x)
    for i in range(3):
        np.testing.assert_allclose(together[i], run(model, x[i : i + 1])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("epsilon", "value"), [(", epsilon = 0.5", 0.5), ("", 1e-5)], ids=["given", "left out"])
def test_epsilon_is_the_operators(epsilon, value):
    x = pixels(2, 4, 3, 3) * np.float32(0.003)  # so small that epsilon decides
    model = rewritten(graph(4, 2, epsilon))
    np.testing.assert_allclose(run(model, x), exact(model, x, 2, value), rtol=0, atol=1e-5)


def test_a_normalization_between_others_is_replaced_in_its_place():
    x = pixels(2, 6, 4, 5)
    model = graph(6, 3, last=False)
    before = run(model, x)
    after = run(rewritten(model), x)
    normed = exact(model, -x, 3)
    np.testing.assert_allclose(after, normed / (1 + np.exp(-normed)), rtol=0, atol=1e-5)  # a few roundings at 3
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("last", [True, False])
def test_inputs_outputs_and_weights_keep_their_names_types_and_shapes(last):
    model, before = graph(6, 3, last=last), graph(6, 3, last=last)
    rewritten(model)
    for ours, theirs in zip(
        (*model.graph.inputs, *model.graph.outputs), (*before.graph.inputs, *before.graph.outputs), strict=True
    ):
        assert (ours.name, ours.dtype, ours.shape) == (theirs.name, theirs.dtype, theirs.shape)
    assert {"weight", "bias"} <= model.graph.initializers.keys()
    names = [value.name for node in model.graph for value in node.outputs]
    assert None not in names
    assert len(set(names)) == len(names)


def test_several_normalizations_are_counted_and_replaced():
    text = """
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[n, 2, h, w] x) => (float[n, 2, h, w] y) <float[2] weight = {1.5, -2}, float[2] bias = {0.5, 1}> {
        a = GroupNormalization <num_groups = 1> (x, weight, bias)
        b = Sin (a)
        y = GroupNormalization <num_groups = 2> (b, weight, bias)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    assert group_norm(model) == 2
    assert group_norm(model) == 0
    x = pixels(2, 2, 5, 5)
    inner = np.sin(exact(model, x, 1))
    np.testing.assert_allclose(run(model, x), exact(model, inner, 2), rtol=0, atol=1e-5)


def test_a_graph_without_one_stays_as_it_is():
    text = '<ir_version: 10, opset_import: ["" : 23]> g (float[n] x) => (float[n] y) { y = Abs (x) }'
    model = ir.from_proto(onnx.parser.parse_model(text))
    before = ir.to_proto(model).SerializeToString()
    assert group_norm(model) == 0
    assert ir.to_proto(model).SerializeToString() == before
