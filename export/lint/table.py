"""The published facts about TensorRT's reader of ONNX, from `tensorrt.json`: operators, types, limits."""

import json
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

__all__ = ["TABLE", "Table", "kind"]

SHORT = {  # types that TensorRT has, as its documentation names them
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "FLOAT8E4M3FN": "FP8",
    "FLOAT4E2M1": "FP4",
}


@dataclass(frozen=True)
class Table:
    """What the reader takes."""

    versions: tuple[str, ...]  # of TensorRT, the oldest first
    opsets: range
    ir_versions: range
    since: dict[str, str]  # operator -> the version of TensorRT that brought it, if the oldest has none
    types: dict[str, frozenset[str]]  # operator -> the types of its numbers
    missing: frozenset[str]  # operators of ONNX that it refuses
    tensors: frozenset[str]  # types that a value may have
    quantized: frozenset[str]  # types that only quantized values may have
    restrictions: dict[str, str]  # operator -> a published restriction
    resize: dict[str, list[str]]  # attribute of Resize -> its values
    pad_modes: list[str]
    longest_shape: int
    largest_k: int

    @property
    def named(self) -> str:
        """The versions as text."""
        return f"TensorRT {' and '.join(self.versions)}"


def kind(dtype: ir.DataType) -> str:
    """The name of a type in the table."""
    return SHORT.get(dtype.name, dtype.name)


def _read(path: Path) -> Table:
    facts = json.loads(path.read_text())
    return Table(
        versions=tuple(facts["versions"]),
        opsets=range(facts["opset"][0], facts["opset"][1] + 1),
        ir_versions=range(facts["ir_version"][0], facts["ir_version"][1] + 1),
        since=facts["since"],
        types={op: frozenset(types.split()) for types, ops in facts["types"].items() for op in ops.split()},
        missing=frozenset(facts["missing"].split()),
        tensors=frozenset(facts["tensors"].split()),
        quantized=frozenset(facts["quantized"].split()),
        restrictions=facts["restrictions"],
        resize=facts["resize"],
        pad_modes=facts["pad_modes"],
        longest_shape=facts["longest_shape"],
        largest_k=facts["largest_k"],
    )


TABLE = _read(Path(__file__).with_name("tensorrt.json"))
