"""The report of TensorRT's inspector: the precision of every layer, and whether attention is fused.

The report changed its form in TensorRT 11: `Bindings` became `I/O Tensors`, and a tensor's `Format/Datatype` became two
entries. Both are read.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Inspected", "inspected"]

TYPES = {  # words of the report -> a precision
    "FP32": "float32",
    "FLOAT": "float32",
    "FP16": "float16",
    "HALF": "float16",
    "BF16": "bfloat16",
    "BFLOAT16": "bfloat16",
    "FP8": "fp8",
    "INT8": "int8",
    "INT4": "int4",
    "FP4": "fp4",
    "INT64": "int64",
    "INT32": "int32",
    "BOOL": "bool",
}
FUSED = re.compile(r"_mha|fmha|flash", re.IGNORECASE)  # in the names of kernels
SOFTMAX = re.compile(r"softmax", re.IGNORECASE)


@dataclass(frozen=True)
class Inspected:
    """What a plan consists of."""

    layers: int
    precisions: dict[str, int]  # of the first output -> layers
    fused_attention: int  # layers whose kernel is a fused attention
    loose_softmax: int  # layers that are a softmax of their own: attention that is not fused
    tensors: tuple[str, ...]  # names of inputs and outputs

    def summary(self) -> str:
        """The report in one line."""
        counts = ", ".join(f"{n} {precision}" for precision, n in sorted(self.precisions.items())) or "no types told"
        return (
            f"{self.layers} layers ({counts}), {self.fused_attention} fused attentions, {self.loose_softmax} not fused"
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        return asdict(self)


def inspected(report: str) -> Inspected:
    """Read the JSON of an inspector. Layers are names only, unless the plan was built with detailed verbosity."""
    document = json.loads(report)
    layers = [layer for layer in document.get("Layers", []) if isinstance(layer, dict)]
    named = document.get("I/O Tensors", document.get("Bindings", []))
    precisions = Counter(kind for layer in layers if (kind := _precision(layer)))
    return Inspected(
        layers=len(document.get("Layers", [])),
        precisions=dict(precisions),
        fused_attention=sum(any(FUSED.search(word) for word in _words(layer)) for layer in layers),
        loose_softmax=sum(bool(SOFTMAX.search(str(layer.get("LayerType", "")))) for layer in layers),
        tensors=tuple(tensor["Name"] if isinstance(tensor, dict) else str(tensor) for tensor in named),
    )


def _precision(layer: Mapping[str, Any]) -> str | None:
    """The type of a layer's first output."""
    for output in layer.get("Outputs", []):
        told = str(output.get("Datatype") or output.get("Format/Datatype", ""))
        words = [word.upper() for word in re.split(r"[^A-Za-z0-9]+", told)]
        return next((TYPES[word] for word in words if word in TYPES), None)
    return None


def _words(layer: Mapping[str, Any]) -> Iterator[str]:
    """The texts of a layer that may name its kernel."""
    for key in ("Name", "TacticName", "LayerType", "Metadata"):
        yield str(layer.get(key, ""))
