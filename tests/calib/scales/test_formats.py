"""The 8-bit formats against PyTorch, a textbook loop in float64, and ONNX Runtime."""

import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from tilewright.calib.scales.formats import (
    E4M3FN,
    E5M2,
    FORMATS,
    INT8,
    UINT8,
    Float8,
    Format,
    Integer,
    Scaling,
    asymmetric,
    dequantise,
    fake_quantise,
    of_channels,
    quantise,
    symmetric,
)

FLOAT8 = {E4M3FN: torch.float8_e4m3fn, E5M2: torch.float8_e5m2}
ML_DTYPES = {E4M3FN: ml_dtypes.float8_e4m3fn, E5M2: ml_dtypes.float8_e5m2}
EVERY_BFLOAT16 = (np.arange(2**16, dtype=np.uint32) << 16).view(np.float32)
KINDS = {
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e5m2": TensorProto.FLOAT8E5M2,
}


def of_torch(numbers: np.ndarray, format: Float8) -> np.ndarray:
    """PyTorch's cast of float32 numbers, as bytes."""
    return torch.from_numpy(numbers.copy()).to(FLOAT8[format]).view(torch.uint8).numpy()


def of_torch_as_numbers(numbers: np.ndarray, format: Float8) -> np.ndarray:
    return torch.from_numpy(numbers.copy()).to(FLOAT8[format]).float().numpy()


def near_ties(format: Float8) -> np.ndarray:
    """Every number of the format, every tie between two, and the float32 numbers next to each, with both signs."""
    numbers = np.sort(format.numbers(np.arange(format.last + 1, dtype=np.uint8)).astype(np.float64))
    beyond = numbers[-1] + (numbers[-1] - numbers[-2]) / 2  # where the next number would begin
    points = np.concatenate([numbers, (numbers[1:] + numbers[:-1]) / 2, [beyond]]).astype(np.float32)
    points = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return np.concatenate([points, -points])


INPUTS = {"every bfloat16": lambda format: EVERY_BFLOAT16, "near ties": near_ties}


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_e4m3fn_is_cast_as_pytorch_casts_it_which_saturates(inputs: Callable[[Float8], np.ndarray]) -> None:
    numbers = inputs(E4M3FN)
    assert np.array_equal(E4M3FN.cast(numbers, saturate=True), of_torch(numbers, E4M3FN))
    overflows = np.abs(numbers) > 464  # halfway to where a next number would be
    assert overflows.any() and not np.isnan(of_torch_as_numbers(numbers[overflows], E4M3FN)).any()


@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
def test_e5m2_is_cast_as_pytorch_casts_it_except_that_infinities_become_the_largest_number(
    inputs: Callable[[Float8], np.ndarray],
) -> None:
    numbers = inputs(E5M2)
    cast = of_torch(numbers, E5M2)
    assert np.array_equal(E5M2.cast(numbers, saturate=False), cast)
    infinite = np.isinf(of_torch_as_numbers(numbers, E5M2))
    saturated = E5M2.cast(numbers, saturate=True)
    assert infinite.any() and np.array_equal(saturated[~infinite], cast[~infinite])
    largest = np.copysign(np.float32(57344), numbers[infinite])
    assert np.array_equal(E5M2.numbers(saturated[infinite]), largest)


@pytest.mark.parametrize("format", FLOAT8, ids=lambda format: format.name)
def test_without_saturation_numbers_are_cast_as_ml_dtypes_casts_them(format: Float8) -> None:
    for inputs in INPUTS.values():
        numbers = inputs(format)
        with np.errstate(over="ignore", invalid="ignore"):
            expected = numbers.astype(ML_DTYPES[format]).astype(np.float32)
        assert np.array_equal(format.numbers(format.cast(numbers, saturate=False)), expected, equal_nan=True)
        assert np.isnan(expected).any() or format is E5M2


@pytest.mark.parametrize("format", FLOAT8, ids=lambda format: format.name)
def test_every_code_stands_for_pytorchs_number(format: Float8) -> None:
    codes = np.arange(256, dtype=np.uint8)
    numbers = torch.from_numpy(codes).view(FLOAT8[format]).float().numpy()
    assert np.array_equal(format.numbers(codes), numbers, equal_nan=True)
    finite = np.isfinite(numbers)
    assert np.array_equal(format.cast(numbers[finite], saturate=True), codes[finite])


def test_the_largest_numbers_are_those_of_the_formats() -> None:
    assert (E4M3FN.highest, E5M2.highest, INT8.highest, UINT8.highest) == (448.0, 57344.0, 127, 255)
    assert set(FORMATS) == {"int8", "uint8", "float8_e4m3fn", "float8_e5m2"}


def exact_code(number: float, scale: float, zero_point: int, format: Integer) -> int:
    """The textbook: an exact quotient, rounded to the nearest integer, ties to even."""
    quotient = Fraction(number) / Fraction(scale)
    return min(max(round(quotient) + zero_point, format.lowest), format.highest)


@pytest.mark.parametrize("format", [INT8, UINT8], ids=lambda format: format.name)
def test_integer_codes_equal_a_loop_in_float64(format: Integer) -> None:
    generator = np.random.default_rng(0)
    for amax in (1e-6, 0.37, 1.0, 6.5e4):
        numbers = generator.normal(0, amax / 3, 2000).astype(np.float32)
        scaling = symmetric(format, amax) if format.symmetric else asymmetric(format, -amax / 4, amax)
        scale, zero_point = float(scaling.scale), int(scaling.zero_point)
        codes = quantise(numbers, scaling)
        assert codes.dtype == (np.int8 if format is INT8 else np.uint8)
        differ = 0
        for number, code in zip(numbers.tolist(), codes.tolist(), strict=True):
            expected = min(max(round(number / scale) + zero_point, format.lowest), format.highest)
            if code != expected:  # only where the quotient in float32 is a tie, and in float64 is not
                assert abs(abs(number / scale - math.floor(number / scale)) - 0.5) < 1e-5 and abs(code - expected) == 1
                differ += 1
        assert differ <= 2


@pytest.mark.parametrize("format", [INT8, UINT8], ids=lambda format: format.name)
def test_integer_codes_are_exact_for_scales_that_are_powers_of_two(format: Integer) -> None:
    ties = np.arange(-400, 400, dtype=np.float32) / 2
    numbers = np.concatenate([ties, np.nextafter(ties, np.float32(1e9)), np.nextafter(ties, np.float32(-1e9))])
    for exponent in (-20, -3, 0, 5):
        scale, zero_point = np.float32(2.0**exponent), 0 if format.symmetric else 37
        scaling = Scaling(format, np.asarray(scale), np.asarray(zero_point, np.int32))
        codes = quantise(numbers * scale, scaling)
        assert codes.tolist() == [exact_code(float(n * scale), float(scale), zero_point, format) for n in numbers]


def scalings(numbers: np.ndarray) -> list[Scaling]:
    amax = float(np.abs(numbers).max())
    every = [symmetric(format, amax * part) for format in (INT8, E4M3FN, E5M2) for part in (1.0, 0.3)]
    return [*every, asymmetric(UINT8, float(numbers.min()), amax), asymmetric(UINT8, -amax / 9, amax / 2)]


def of_onnx_runtime(numbers: np.ndarray, scaling: Scaling) -> np.ndarray:
    """The numbers after ONNX's QuantizeLinear and DequantizeLinear."""
    kind = KINDS[scaling.format.name]
    zeros = np.atleast_1d(scaling.zero_point)
    zero_point = helper.make_tensor("zero_point", kind, scaling.zero_point.shape, zeros.tolist())
    scale = helper.make_tensor("scale", TensorProto.FLOAT, scaling.scale.shape, np.atleast_1d(scaling.scale).tolist())
    axis = {} if scaling.axis is None else {"axis": scaling.axis}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["codes"], **axis),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero_point"], ["y"], **axis),
    ]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, numbers.shape) for name in "xy"]
    graph = helper.make_graph(nodes, "qdq", ends[:1], ends[1:], [scale, zero_point])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(["y"], {"x": numbers})
    return result


def test_fake_quantised_numbers_are_those_of_onnx_runtime() -> None:
    numbers = np.random.default_rng(1).standard_t(3, (64, 257)).astype(np.float32)
    for scaling in scalings(numbers):
        assert np.array_equal(fake_quantise(numbers, scaling), of_onnx_runtime(numbers, scaling)), scaling


@pytest.mark.parametrize("format", [INT8, E4M3FN, E5M2], ids=lambda format: format.name)
def test_channels_have_their_own_scales(format: Format) -> None:
    generator = np.random.default_rng(2)
    weights = (generator.normal(0, 1, (5, 7, 3)) * 10.0 ** generator.integers(-4, 4, (5, 1, 1))).astype(np.float32)
    for axis in (0, -3, 1, 2):
        scaling = of_channels(format, weights, axis)
        fake = fake_quantise(weights, scaling)
        assert np.array_equal(fake, of_onnx_runtime(weights, replace(scaling, axis=axis % 3)))
        moved = zip(np.moveaxis(weights, axis, 0), np.moveaxis(fake, axis, 0), scaling.scale, strict=True)
        for channel, fake_channel, scale in moved:
            assert scale == np.float32(np.float64(np.abs(channel).max()) / format.highest)
            assert np.array_equal(fake_channel, fake_quantise(channel, symmetric(format, np.abs(channel).max())))


@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_zero_stays_zero_and_an_empty_range_has_a_scale(format: Format) -> None:
    for amax in (0.0, 1e-42, 3e38):
        scaling = symmetric(format, amax) if format.symmetric else asymmetric(format, -amax, amax)
        assert np.isfinite(scaling.scale) and scaling.scale > 0
        assert fake_quantise(np.zeros(3, np.float32), scaling).tolist() == [0, 0, 0]
    assert dequantise(quantise(np.float32(3.0), symmetric(INT8, 3.0)), symmetric(INT8, 3.0)) == 3.0


def test_infinities_saturate_and_integers_refuse_nan() -> None:
    numbers = np.array([np.inf, -np.inf], np.float32)
    for format, ends in ((INT8, [127, -128]), (UINT8, [255, 0])):
        scaling = symmetric(format, 1.0) if format.symmetric else asymmetric(format, -1.0, 1.0)
        assert quantise(numbers, scaling).tolist() == ends
        with pytest.raises(ValueError, match=f"NaN has no code in {format.name}"):
            quantise(np.array([0.0, np.nan], np.float32), scaling)
    assert fake_quantise(numbers, symmetric(E4M3FN, 448)).tolist() == [448, -448]
    assert np.isnan(fake_quantise(np.float32(np.nan), symmetric(E5M2, 1)))
