"""Tracing: graphs without a weight's byte, equal on repeat, accepted by others' tools, equal to eager PyTorch."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from polygraphy.tools import main
from torch import nn

from support.systems import components_of
from tilewright.export.graph.ops import inline
from tilewright.export.graph.trace import OPSET, UNRESOLVED, network_on_meta, trace
from tilewright.export.system import ComponentSpec
from tilewright.runtime.bundle.program import TensorSpec

COMPONENTS = pytest.mark.parametrize("component", ["generate", "decode"])
FORMS = pytest.mark.parametrize("form", ["traced", "model", "ort"])


def parameters(component: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the state dict; DINOv3's mask token has no effect and is not traced."""
    network = network_on_meta(components_of("hitoksr", "tiny")[component])
    named = {name: tuple(p.shape) for name, p in network.named_parameters()}
    return {name: shape for name, shape in named.items() if not name.endswith("embeddings.mask_token")}


@pytest.mark.slow
@COMPONENTS
def test_every_parameter_is_an_unresolved_reference_by_its_name_in_the_state_dict(traced, component):
    graph = ir.load(traced / f"{component}.onnx").graph
    outside = {n: v.const_value for n, v in graph.initializers.items() if isinstance(v.const_value, ir.ExternalTensor)}
    assert {name: tuple(t.shape.numpy()) for name, t in outside.items()} == parameters(component)
    assert {str(t.location) for t in outside.values()} == {UNRESOLVED}
    assert {t.dtype for t in outside.values()} == {ir.DataType.FLOAT}
    for name, value in graph.initializers.items():
        assert (value.dtype, value.shape) == (value.const_value.dtype, value.const_value.shape), name


@COMPONENTS
def test_no_byte_of_a_weight_is_in_the_graph(traced, component):
    proto = onnx.load(traced / f"{component}.onnx", load_external_data=False)
    names = parameters(component)
    for tensor in proto.graph.initializer:
        if tensor.name in names:
            assert tensor.data_location == onnx.TensorProto.EXTERNAL
            assert not tensor.raw_data
            assert not tensor.float_data
    inside = [t for t in proto.graph.initializer if t.name not in names]
    inside += [a.t for node in proto.graph.node for a in node.attribute if a.HasField("t")]
    assert sum(len(tensor.SerializeToString()) for tensor in inside) < 50_000  # of indices, sizes and frequencies


@COMPONENTS
def test_buffers_are_real_and_have_their_values(traced, component):
    graph = ir.load(traced / f"{component}.onnx").graph
    buffers = dict(network_on_meta(components_of("hitoksr", "tiny")[component]).named_buffers())
    assert {name.rsplit(".")[-1] for name in buffers} == (
        {"mean", "deviation", "inv_freq"} if component == "generate" else set()
    )
    for name, buffer in buffers.items():
        np.testing.assert_array_equal(graph.initializers[name].const_value.numpy(), buffer.numpy())


@COMPONENTS
def test_inputs_and_outputs_have_the_specifications_names_types_and_sizes(traced, component):
    source = components_of("hitoksr", "tiny")[component]
    graph = ir.load(traced / f"{component}.onnx").graph
    for values, specs in ((graph.inputs, source.inputs), (graph.outputs, source.outputs)):
        assert [value.name for value in values] == list(specs)
        for value, spec in zip(values, specs.values(), strict=True):
            assert tuple(d if isinstance(d, int) else d.value for d in value.shape) == spec.shape
            assert value.dtype == {"float32": ir.DataType.FLOAT, "int32": ir.DataType.INT32}[spec.dtype]


@COMPONENTS
def test_every_free_size_in_the_graph_is_one_of_ours(traced, component):
    source = components_of("hitoksr", "tiny")[component]
    model = ir.load(traced / f"{component}.onnx")
    named = {d for spec in (*source.inputs.values(), *source.outputs.values()) for d in spec.shape if d is not int}
    known = named | {f"{name}_units" for name in source.multiples} | {"CeilToInt", "FloatTrueDiv", "ToFloat"}
    written = {
        word
        for node in model.graph
        for value in node.outputs
        if value.shape is not None
        for dim in value.shape
        for word in re.findall(r"[A-Za-z_]\w*", str(dim) if isinstance(dim, int) else str(dim.value))
    }
    assert written  # the graph has free sizes inside
    assert written <= known


@COMPONENTS
@FORMS
def test_the_graph_has_standard_operators_and_our_nodes_with_a_function_each(graphs, component, form):
    model = ir.load(graphs / f"{component}.{form}.onnx")
    ours = [node for node in model.graph.all_nodes() if node.domain]
    assert {node.op_type.split("_without_")[0] for node in ours} == {
        "generate": {"QkvNormRope", "CodebookFromHidden", *(["SiluConv"] if form == "ort" else [])},
        "decode": {"QkvNormRope"},
    }[component]
    assert {node.op_identifier() for node in ours} == {f for f in model.functions if f[0] == "tilewright"}
    assert {n.domain for f in model.functions.values() if f.domain == "tilewright" for n in f} == {""}
    assert model.opset_imports[""] == OPSET
    if form != "traced":  # folding inlines whatever functions the exporter leaves
        assert {f[0] for f in model.functions} == {"tilewright"}
        assert dict(model.opset_imports) == {"": OPSET, "tilewright": 1}
    inline(model)
    assert {node.domain for node in model.graph.all_nodes()} == {""}


@COMPONENTS
def test_nothing_of_this_machine_is_in_the_graph(traced, component):
    data = (traced / f"{component}.onnx").read_bytes()
    for word in (str(Path.home()), os.getcwd(), "site-packages", ".py", torch.__version__):  # noqa: PTH109
        assert word.encode() not in data, word


@COMPONENTS
@FORMS
def test_the_checker_accepts_the_graph(graphs, component, form):
    onnx.checker.check_model(str(graphs / f"{component}.{form}.onnx"), full_check=True)


@pytest.fixture
def polygraphy(monkeypatch, capsys) -> Callable[..., str]:
    """Run its command and return what it says."""

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["polygraphy", *words])
        status = main()
        said = capsys.readouterr().out
        assert status == 0, said
        return said

    return run


@COMPONENTS
@pytest.mark.parametrize("form", ["model", "ort"])
def test_polygraphy_inspects_the_graph(graphs, polygraphy, component, form):
    file = graphs / f"{component}.{form}.onnx"
    shown = polygraphy("inspect", "model", str(file))
    source = components_of("hitoksr", "tiny")[component]
    for name in (*source.inputs, *source.outputs):
        assert re.search(rf"\b{name} \[dtype=", shown), name
    assert f"---- {ir.load(file).graph.num_nodes()} Node(s) ----" in shown


@COMPONENTS
@pytest.mark.parametrize("form", ["model", "ort"])
def test_polygraphy_finds_nothing_to_mend_in_the_graph(graphs, polygraphy, component, form):
    shapes = {"generate": "image:[2,3,64,48]", "decode": "codes:[2,8,4,3]"}[component]
    file, folder = graphs / f"{component}.{form}.onnx", str(graphs)
    said = polygraphy("check", "lint", str(file), "--input-shapes", shapes, "--external-data-dir", folder)
    assert "PASSED" in said
    assert "[E]" not in said


# (2, 64, 48): the specification's tiny input; (3, 32, 80): wide; (1, 16, 16): one patch, so every size is 1 where it
# can be; (2, 48, 64): the example's own size, which the exporter saw as fakes in this process
SIZES = pytest.mark.parametrize("size", [(2, 64, 48), (3, 32, 80), (1, 16, 16), (2, 48, 64)], ids=str)


@pytest.fixture(scope="module")
def sessions(graphs) -> dict[tuple[str, str], onnxruntime.InferenceSession]:
    """Stock sessions, default options."""
    return {
        (component, form): onnxruntime.InferenceSession(
            graphs / f"{component}.{form}.onnx", providers=["CPUExecutionProvider"]
        )
        for component in ("generate", "decode")
        for form in ("traced", "model", "ort")
    }


def image(size: tuple[int, int, int]) -> torch.Tensor:
    batch, height, width = size
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(height + width))


@SIZES
@FORMS
def test_the_generator_chooses_as_eager_pytorch_does(sessions, eager, form, size):
    codes, indices = eager["generate"](image(size))
    ours = sessions["generate", form].run(["codes", "indices"], {"image": image(size).numpy()})
    assert ours[1].dtype == np.int32
    assert len(np.unique(indices)) > (1 if indices.numel() < 16 else 8)  # the choices are choices
    np.testing.assert_array_equal(ours[1], indices)
    np.testing.assert_array_equal(ours[0], codes)  # gathered, not computed


@SIZES
@FORMS
def test_the_decoder_paints_as_eager_pytorch_does(sessions, eager, form, size):
    codes, _ = eager["generate"](image(size))
    expected = eager["decode"](codes).double().numpy()
    (ours,) = sessions["decode", form].run(None, {"codes": codes.numpy()})
    assert ours.shape == (size[0], 3, *size[1:])
    assert expected.std() > 0.1
    # float32 sums in another order over two blocks; measured 1e-7
    assert np.linalg.norm(ours - expected) <= 1e-5 * np.linalg.norm(expected)


@FORMS
def test_an_image_of_a_batch_is_restored_as_it_is_alone(sessions, form):
    images = image((3, 32, 48)).numpy()
    _, together = sessions["generate", form].run(["codes", "indices"], {"image": images})
    for i in range(3):
        _, alone = sessions["generate", form].run(["codes", "indices"], {"image": images[i : i + 1]})
        np.testing.assert_array_equal(together[i], alone[0])


@pytest.mark.slow
def test_tracing_again_in_another_order_gives_the_same_bytes(traced, tmp_path):
    ir.save(trace(components_of("hitoksr", "tiny")["decode"]), tmp_path / "decode.onnx")
    assert (tmp_path / "decode.onnx").read_bytes() == (traced / "decode.onnx").read_bytes()


@pytest.mark.parametrize("preset", ["tiny", "full"])
@COMPONENTS
def test_networks_are_made_without_storage_but_with_their_buffers(preset, component):
    network = network_on_meta(components_of("hitoksr", preset)[component])
    assert not network.training
    assert {p.device.type for p in network.parameters()} == {"meta"}
    assert {b.device.type for b in network.buffers()} <= {"cpu"}
    if component == "generate":
        assert network.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


class Mixed(nn.Module):
    """Two inputs with a size in common, a weight that is used transposed, one that is not used, one in half."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 4)
        self.idle = nn.Parameter(torch.ones(3))
        self.narrow = nn.Parameter(torch.ones(4, dtype=torch.float16))
        self.offset = nn.Buffer(torch.arange(4.0), persistent=False)

    def forward(self, tokens, picture):
        pooled = picture.mean((1, 2, 3))
        return self.mix(tokens) * self.narrow.float() + self.offset + pooled[:, None, None], tokens.flatten(1) * 2


def test_sizes_that_inputs_share_are_one_and_others_are_free(tmp_path):
    specs = {
        "tokens": TensorSpec("float32", ("batch", "count", 6)),
        "picture": TensorSpec("float32", ("batch", 3, "height", "height")),
    }
    outputs = {
        "mixed": TensorSpec("float32", ("batch", "count", 4)),
        "flat": TensorSpec("float32", ("batch", "flat_size")),
    }
    model = trace(ComponentSpec(Mixed, specs, outputs, {}, {"height": 8}))
    weights = {n: v.const_value for n, v in model.graph.initializers.items()}
    outside = {name for name, tensor in weights.items() if isinstance(tensor, ir.ExternalTensor)}
    assert outside == {"mix.weight", "mix.bias", "narrow"}
    assert weights["narrow"].dtype == ir.DataType.FLOAT16
    dims = {str(d) for node in model.graph for v in node.outputs if v.shape for d in v.shape if not isinstance(d, int)}
    assert {"batch", "count", "6*count"} <= dims

    network = Mixed().requires_grad_(False)
    for name, parameter in network.named_parameters():
        if name in outside:
            model.graph.initializers[name].const_value = ir.tensor(parameter.numpy(), name=name)
    ir.save(model, tmp_path / "mixed.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "mixed.onnx", providers=["CPUExecutionProvider"])
    for batch, count, height in [(2, 3, 32), (1, 1, 8), (5, 7, 16)]:
        tokens, picture = torch.rand(batch, count, 6), torch.rand(batch, 3, height, height)
        ours = session.run(["mixed", "flat"], {"tokens": tokens.numpy(), "picture": picture.numpy()})
        for array, expected in zip(ours, network(tokens, picture), strict=True):
            np.testing.assert_allclose(array, expected.detach(), rtol=0, atol=1e-6)  # a few float32 roundings
