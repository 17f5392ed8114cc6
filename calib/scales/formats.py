"""The 8-bit formats: which numbers their codes stand for, and how a number becomes a code and a number again.

    code = round(number / scale) + zero point        number = (code - zero point) * scale

Rounding is to the nearest code, ties to the even one. The division is in float32, as in ONNX's QuantizeLinear, so
codes equal those of the engines. Numbers beyond the last code become the last code (saturation), infinities too. NaN
stays NaN in the float8 formats. The integer formats have no code for it and refuse it.

PyTorch 2.13 saturates when it casts to e4m3fn, infinities too, and does not saturate when it casts to e5m2. Without
saturation, a number that rounds to more than the last one becomes NaN in e4m3fn, which has no infinity, and infinity
in e5m2.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "E4M3FN",
    "E5M2",
    "FORMATS",
    "INT8",
    "UINT8",
    "Float8",
    "Integer",
    "Scaling",
    "asymmetric",
    "dequantise",
    "fake_quantise",
    "of_channels",
    "quantise",
    "symmetric",
]

Floats = npt.NDArray[np.float32]
Codes = npt.NDArray[np.int8] | npt.NDArray[np.uint8]
BLOCK = 1 << 16  # numbers that are cast at once
LEAST_SCALE = float(np.finfo(np.float32).tiny)  # engines flush smaller numbers to zero, and divide by them


@dataclass(frozen=True)
class Integer:
    """An integer format. A symmetric one has no zero point; the codes of numbers reach as far below zero as above."""

    name: str
    lowest: int
    highest: int
    symmetric: bool

    @property
    def dtype(self) -> Any:
        """The type of a code."""
        return np.int8 if self.lowest < 0 else np.uint8

    def codes(self, scaled: Floats, zero_point: Any) -> Codes:
        """The codes of numbers that are divided by their scale."""
        if np.isnan(scaled).any():
            raise ValueError(f"NaN has no code in {self.name}")
        codes = np.clip(np.rint(scaled) + np.float32(zero_point), self.lowest, self.highest)
        return np.asarray(codes, self.dtype)

    def numbers(self, codes: Codes, zero_point: Any) -> Floats:
        """The numbers of codes, before the scale."""
        return np.asarray(codes, np.float32) - np.float32(zero_point)


@dataclass(frozen=True)
class Float8:
    """A float of one byte: a sign, an exponent, a mantissa."""

    name: str
    mantissa_bits: int
    bias: int  # of the exponent
    last: int  # the code of the largest number
    overflow: int  # the code of a number that is too large, without saturation
    symmetric: bool = True
    dtype: Any = np.uint8

    @property
    def highest(self) -> float:
        """The largest number."""
        return float(self._table[self.last])

    def codes(self, scaled: Floats, zero_point: Any = 0) -> Codes:
        """The codes of numbers that are divided by their scale."""
        return self.cast(scaled, saturate=True)

    def numbers(self, codes: Codes, zero_point: Any = 0) -> Floats:
        """The numbers of codes, before the scale."""
        return self._table[codes]

    def cast(self, numbers: Floats, *, saturate: bool) -> npt.NDArray[np.uint8]:
        """The codes of float32 numbers."""
        array = np.asarray(numbers, np.float32)
        if array.flags.f_contiguous and not array.flags.c_contiguous:
            return self.cast(array.T, saturate=saturate).T
        bits, table = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint32),
            self._saturated if saturate else self._cast,
        )
        codes = np.empty(bits.size, np.uint8)
        for start in range(0, bits.size, BLOCK):
            block = bits[start : start + BLOCK]
            # two numbers round alike if their upper halves are equal and neither lower half is zero
            codes[start : start + BLOCK] = table[(block >> 16) | (block & 0xFFFF != 0)]
        return codes.reshape(array.shape)

    @cached_property
    def _saturated(self) -> npt.NDArray[np.uint8]:
        return self._codes_of_halves(self.last)

    @cached_property
    def _cast(self) -> npt.NDArray[np.uint8]:
        return self._codes_of_halves(self.overflow)

    def _codes_of_halves(self, beyond: int) -> npt.NDArray[np.uint8]:
        """The codes of all upper halves of float32 numbers. `beyond`: of numbers that are too large."""
        bits = np.arange(1 << 16, dtype=np.uint32) << 16
        magnitude, cut = bits & 0x7FFF_FFFF, 23 - self.mantissa_bits
        # half of the last place that is kept, and a little less where the place is even: ties go to the even code
        rounded = magnitude + (2 ** (cut - 1) - 1) + ((magnitude >> cut) & 1)
        codes = (rounded >> cut).astype(np.int64) - ((127 - self.bias) << self.mantissa_bits)
        small = magnitude < (128 - self.bias) << 23  # below the smallest number with a whole mantissa
        steps = magnitude.view(np.float32)[small] * np.float32(2.0 ** (self.bias - 1 + self.mantissa_bits))
        codes[small] = np.rint(steps).astype(np.int64)
        codes = np.where(codes > self.last, beyond, codes)
        codes = np.where(magnitude > 0x7F80_0000, 0x7F, codes)  # NaN
        return np.asarray(codes | (bits >> 31 << 7), np.uint8)

    @cached_property
    def _table(self) -> Floats:
        """The number of each of the 256 codes."""
        codes = np.arange(128)
        exponents, mantissas = codes >> self.mantissa_bits, codes & (2**self.mantissa_bits - 1)
        fractions = mantissas / 2**self.mantissa_bits + (exponents > 0)
        numbers = fractions * 2.0 ** (np.maximum(exponents, 1) - self.bias)
        numbers[self.last + 1 :] = np.nan
        if self.overflow != 0x7F:
            numbers[self.overflow] = np.inf
        return np.asarray(np.concatenate([numbers, -numbers]), np.float32)


INT8 = Integer("int8", -128, 127, symmetric=True)
UINT8 = Integer("uint8", 0, 255, symmetric=False)
E4M3FN = Float8("float8_e4m3fn", mantissa_bits=3, bias=7, last=0x7E, overflow=0x7F)
E5M2 = Float8("float8_e5m2", mantissa_bits=2, bias=15, last=0x7B, overflow=0x7C)
Format = Integer | Float8
FORMATS: dict[str, Format] = {f.name: f for f in (INT8, UINT8, E4M3FN, E5M2)}


@dataclass(frozen=True)
class Scaling:
    """A format with the scale and the zero point of a tensor, or of each of its channels."""

    format: Format
    scale: Floats  # [], or [channels]
    zero_point: npt.NDArray[np.int32]  # of the same shape
    axis: int | None = None  # of the channels; none: one scale for the whole tensor

    def along(self, numbers: npt.NDArray[Any], ndim: int) -> Any:
        """The scale or the zero point in a shape that a tensor of so many dimensions can be divided by."""
        if self.axis is None:
            return numbers
        return numbers.reshape([-1 if axis == self.axis % ndim else 1 for axis in range(ndim)])


def symmetric(format: Format, amax: Any, axis: int | None = None) -> Scaling:
    """The scaling whose last code is the magnitude `amax`: one number, or one for each channel.

    int8 uses the codes from -127 to 127 within `amax`; -128 is only reached beyond it.
    """
    scale = np.asarray(np.maximum(np.float64(amax) / format.highest, LEAST_SCALE), np.float32)
    return Scaling(format, scale, np.zeros(scale.shape, np.int32), axis)


def asymmetric(format: Integer, lowest: float, highest: float) -> Scaling:
    """The scaling of a whole tensor whose numbers lie in this range. Zero has a code of its own."""
    lowest, highest = min(0.0, float(lowest)), max(0.0, float(highest))
    scale = np.float32(max((highest - lowest) / (format.highest - format.lowest), LEAST_SCALE))
    zero_point = format.lowest + round(-lowest / float(scale))
    return Scaling(format, np.asarray(scale), np.asarray(min(zero_point, format.highest), np.int32))


def of_channels(format: Format, weights: Floats, axis: int) -> Scaling:
    """The scaling of weights: for each channel along the axis, its largest magnitude."""
    others = tuple(i for i in range(weights.ndim) if i != axis % weights.ndim)
    return symmetric(format, np.abs(weights).max(others, initial=0.0), axis)


def quantise(numbers: Any, scaling: Scaling) -> Codes:
    """The codes of numbers; those of a float8 format as bytes."""
    array = np.asarray(numbers, np.float32)
    with np.errstate(over="ignore"):  # beyond float32: infinity, which saturates
        scaled = array / scaling.along(scaling.scale, array.ndim)
    return scaling.format.codes(scaled, scaling.along(scaling.zero_point, array.ndim))


def dequantise(codes: Codes, scaling: Scaling) -> Floats:
    """The numbers that codes stand for, in float32."""
    numbers = scaling.format.numbers(codes, scaling.along(scaling.zero_point, codes.ndim))
    return np.asarray(numbers * scaling.along(scaling.scale, codes.ndim), np.float32)


def fake_quantise(numbers: Any, scaling: Scaling) -> Floats:
    """Numbers as they are after a format has stored them."""
    return dequantise(quantise(numbers, scaling), scaling)
