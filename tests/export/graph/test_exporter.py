"""What the exporter works out once: equal graphs, also where its private parts have changed."""

import contextlib

import onnx_ir as ir
import pytest
import sympy
import torch
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion

from support.systems import components_of
from tilewright.export.graph import trace as tracing
from tilewright.export.graph.exporter import quicker


def traced() -> bytes:
    return ir.serde.serialize_model(tracing.trace(components_of("instantir", "tiny")["gates"])).SerializeToString()


def parts() -> list[object]:
    owners = ONNXRegistry, type_promotion._TypePromotionInterpreter, sympy.Expr, torch.fx.config
    names = "from_torchlib", "run_node", "is_number", "do_not_emit_stack_traces"
    return [vars(owner)[name] for owner, name in zip(owners, names, strict=True)]


@pytest.mark.slow
def test_graphs_are_those_that_the_exporter_makes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """`gates` multiplies and adds numbers of other types, which are promoted."""
    quick = traced()
    monkeypatch.setattr(tracing, "quicker", contextlib.nullcontext)
    assert traced() == quick


def test_a_part_that_is_absent_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = parts()
    monkeypatch.delattr(type_promotion, "get_type_promotion_rule")
    with quicker():
        assert [a is b for a, b in zip(before, parts(), strict=True)] == [False, True, False, False]


def test_everything_is_put_back() -> None:
    before = parts()
    with pytest.raises(ZeroDivisionError), quicker():
        assert not any(a is b for a, b in zip(before, parts(), strict=True))
        _ = 1 / 0
    assert all(a is b for a, b in zip(before, parts(), strict=True))
