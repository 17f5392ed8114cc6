"""Engines of OpenVINO on the CPU. One graph serves all precisions: OpenVINO changes the precision as it compiles."""

from dataclasses import replace
from typing import Any

from tilewright.runtime.bundle.manifest import EngineSpec, Form, Memory, Needs

__all__ = ["COMPILED", "FORMS", "FROM_BUNDLE", "PRECISIONS", "missing", "prepare", "spec"]

FROM_BUNDLE = True
COMPILED = False
PRECISIONS = ("float32", "bfloat16")
FORMS = {"int8": tuple(Form(inputs, rest=rest) for rest in PRECISIONS for inputs in ("uint8", "int8"))}
INSTRUCTIONS = {"bfloat16": ("avx512_bf16",)}  # without them OpenVINO would compute in float32, and not say so
CORES = {"bfloat16": 2}  # as in runtime/engines/openvino.py
VERSION = "2026.4"  # the least that was tested
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1}


def missing() -> str | None:
    """Nothing: its engines are graphs, which are made anywhere."""
    return None


def prepare(model: Any) -> bool:
    """Replace our nodes by standard operators, as OpenVINO does not read functions; returns whether there were any."""
    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.tidy import tidy

    if not model.functions:
        return False
    inline(model)
    tidy(model)
    return True


def spec(precision: str, graph: str, memory: Memory, parameters: int) -> EngineSpec:
    """The description of the engine. It copies all weights, as it re-packs them."""
    needs = Needs(INSTRUCTIONS.get(precision, ()), None, {"openvino": VERSION}, CORES.get(precision, 1))
    copied = replace(memory, copied=WIDTHS[precision] * parameters)
    return EngineSpec(f"openvino-{precision}", "openvino", "cpu", precision, (graph,), needs, memory=copied)
