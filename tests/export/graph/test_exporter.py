"""What the exporter works out once: equal graphs, also where its private parts have changed."""

import contextlib

import onnx_ir as ir
import pytest
import sympy
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.sym_node import SymNode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

from support.systems import components_of
from tilewright.export.graph import trace as tracing
from tilewright.export.graph.exporter import quicker

PARTS = (
    (ONNXRegistry, "from_torchlib"),
    (type_promotion._TypePromotionInterpreter, "run_node"),
    (sympy.Expr, "is_number"),
    (SymNode, "expr"),
    (SymNode, "maybe_as_int"),
    (ShapeEnv, "_create_fx_call_function"),
    (FakeTensorMode, "_get_output_info_for_cache_entry"),
    (torch.fx.config, "do_not_emit_stack_traces"),
)


def traced(system: str, component: str) -> bytes:
    return ir.serde.serialize_model(tracing.trace(components_of(system, "tiny")[component])).SerializeToString()


def parts() -> list[object]:
    return [vars(owner)[name] for owner, name in PARTS]


@pytest.mark.slow
@pytest.mark.parametrize(("system", "component"), [("instantir", "gates"), ("toksr", "step")])
def test_graphs_are_those_that_the_exporter_makes_alone(
    system: str, component: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`gates` multiplies and adds numbers of other types, which are promoted; `step` has blocks that are alike."""
    quick = traced(system, component)
    monkeypatch.setattr(tracing, "quicker", contextlib.nullcontext)
    monkeypatch.setattr(tracing, "_alike", lambda node: object())  # every decomposition is made
    assert traced(system, component) == quick


def test_a_part_that_is_absent_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts()
    monkeypatch.delattr(type_promotion, "get_type_promotion_rule")
    with quicker():
        left = [place for place, a, b in zip(PARTS, before, parts(), strict=True) if a is b]
    assert left == [(type_promotion._TypePromotionInterpreter, "run_node")]


def test_everything_is_put_back() -> None:
    before = parts()
    with pytest.raises(ZeroDivisionError), quicker():
        assert not any(a is b for a, b in zip(before, parts(), strict=True))
        _ = 1 / 0
    assert all(a is b for a, b in zip(before, parts(), strict=True))
