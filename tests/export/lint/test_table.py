"""The committed table of TensorRT's operators: complete for ONNX, and every restriction in it has a check."""

import onnx

from tilewright.export.lint.restrictions import RESTRICTIONS
from tilewright.export.lint.table import TABLE

BEFORE_ONNX = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # experiments that ONNX dropped
ELSEWHERE = {"Cast", "CastLike", "DequantizeLinear", "QuantizeLinear"}  # restricted in types and zero points


def test_it_says_of_every_operator_of_onnx_whether_tensorrt_has_it():
    history = onnx.defs.get_all_schemas_with_history()
    standard = {s.name for s in history if s.domain == "" and s.since_version <= TABLE.opsets[-1]}
    assert TABLE.types.keys() | TABLE.missing == standard | BEFORE_ONNX
    assert not TABLE.types.keys() & TABLE.missing
    assert TABLE.since.keys() <= TABLE.types.keys()


def test_its_types_are_types_of_tensors():
    assert {kind for kinds in TABLE.types.values() for kind in kinds} <= TABLE.tensors | {"UINT8"}
    assert TABLE.quantized < TABLE.tensors


def test_every_published_restriction_has_a_check():
    assert TABLE.restrictions.keys() - ELSEWHERE <= RESTRICTIONS.keys()
    assert RESTRICTIONS.keys() <= TABLE.types.keys()
