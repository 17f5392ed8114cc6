"""The graphs of all systems have no findings: tiny ones as bundles have them, and wide ones without weights."""

from collections.abc import Mapping
from dataclasses import replace

import onnx_ir as ir
import pytest

from support.systems import EVERY_SYSTEM, components_of
from tilewright.export.graph.ops import inline
from tilewright.export.graph.rewrites.forget_shapes import forget_shapes
from tilewright.export.graph.tidy import tidy
from tilewright.export.graph.trace import UNRESOLVED, trace
from tilewright.export.lint.graph import prepared
from tilewright.export.lint.lint import RULES, lint
from tilewright.runtime.bundle.read import read_bundle


@pytest.fixture(scope="module", params=EVERY_SYSTEM)
def bundle(request, unverified):
    """A system's tiny bundle; do not change it."""
    return unverified(request.param)


def test_a_tiny_bundle_has_no_findings(bundle):
    report = lint(bundle, "tensorrt")
    components = read_bundle(bundle).manifest.components
    assert report["findings"] == [] and report["graphs"].keys() == components.keys()
    for name, component in components.items():
        stored, counts = ir.load(bundle / component.graph), report["graphs"][name]
        weights = [value.const_value for value in stored.graph.initializers.values()]
        assert counts["nodes"] == sum(1 for _ in stored.graph.all_nodes())
        assert counts["external"] == sum(isinstance(weight, ir.ExternalTensor) for weight in weights)
        assert counts["unknown"] == 0  # so every rule about types and ranks could be decided


def test_our_ops_as_standard_operators_have_no_findings_either(bundle):
    components = read_bundle(bundle).manifest.components.values()
    models = [ir.load(bundle / component.graph) for component in components]
    for model in models:
        inline(model)
        graph = prepared(model, bundle.joinpath)
        assert not any(node.domain for node in graph.nodes)
        assert [fault for name, rule in RULES.items() if name != "places of weights" for fault in rule(graph)] == []


FEW = {"depth": 2, "num_hidden_layers": 4, "class_layers": (1, 2, 3, 4), "layers_per_block": 1}


def few_blocks(sizes):
    """The sizes of networks as wide with few blocks, which are alike."""
    return {
        name: few_blocks(value) if isinstance(value, Mapping) else FEW.get(name, value) for name, value in sizes.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(("system", "preset"), [("hitoksr", "full"), ("in-token", "mid")])  # mid: as wide, few blocks
def test_graphs_of_published_widths_have_no_findings_but_that_their_weights_have_no_file_yet(system, preset, tmp_path):
    for spec in components_of(system, preset).values():
        model = trace(replace(spec, arguments=few_blocks(spec.arguments)))
        tidy(model)
        forget_shapes(model)
        ir.save(model, tmp_path / "wide.onnx")
        graph = prepared(ir.load(tmp_path / "wide.onnx"), tmp_path.joinpath)
        faults = [(name, fault) for name, rule in RULES.items() for fault in rule(graph)]
        assert [fault for fault in faults if UNRESOLVED not in fault[1].problem] == []
        assert len(graph.nodes) > 3 and not any(value.shape is None for node in graph.nodes for value in node.outputs)
