"""What was seen of each tensor at each step: a histogram, its exact range, and the largest magnitude of each channel.

Observations of parts can be joined in any order, and are the same to the last bit. They are kept in a safetensors file:

    TENSOR:steps     int32 [S]          the steps at which it was seen
    TENSOR:range     float32 [S, 2]     the lowest and the highest number
    TENSOR:top       int32 [S]          the exponent of the largest magnitude, see `histograms`
    TENSOR:counts    int64 [S, 2, BINS] negative and other numbers in each bin
    TENSOR:channels  float32 [S, C]     the largest magnitude of each channel, where the tensor has channels

The file's metadata tells what was observed, as texts of JSON.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.calib.scales.histograms import BINS, Histogram, histogram_of, merged
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.safetensors import safetensors_metadata, safetensors_start
from tilewright.runtime.errors import BundleError, InputError
from tilewright.runtime.inputs import read_tensors

__all__ = ["FORMAT", "Observation", "Observations", "read_observations"]

FORMAT = "tilewright statistics 1"
TYPES = {"steps": "int32", "range": "float32", "top": "int32", "counts": "int64"}
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Observation:
    """What was seen of one tensor."""

    histogram: Histogram
    channels: Floats | None = None  # the largest magnitude of each; none: the tensor has no channels


def _joined(one: Observation, other: Observation) -> Observation:
    """What both have seen."""
    histogram = merged(one.histogram, other.histogram)
    if one.channels is None and other.channels is None:
        return Observation(histogram)
    if one.channels is None or other.channels is None or one.channels.shape != other.channels.shape:
        counts = [None if o.channels is None else o.channels.size for o in (one, other)]
        raise ValueError(f"{counts[0]} and with {counts[1]} channels")
    return Observation(histogram, np.maximum(one.channels, other.channels))


class Observations:
    """What was seen, by tensor and step."""

    def __init__(self, seen: Mapping[tuple[str, int], Observation] | None = None) -> None:
        self.seen = dict(seen or {})

    def add(self, tensor: str, step: int, array: Any, channel_axis: int | None = None) -> None:
        """Observe an array of a tensor. Numbers that are not finite are refused."""
        if not array.size:
            return
        channels = None
        histogram = histogram_of(array)
        if channel_axis is not None:
            others = tuple(axis for axis in range(array.ndim) if axis != channel_axis % array.ndim)
            channels = np.maximum(array.max(others), -array.min(others)).astype(np.float32) + np.float32(0)
        self._join(tensor, step, Observation(histogram, channels))

    def merge(self, other: "Observations") -> None:
        """Add what others have seen."""
        for (tensor, step), observation in other.seen.items():
            self._join(tensor, step, observation)

    def _join(self, tensor: str, step: int, observation: Observation) -> None:
        before = self.seen.get((tensor, step))
        try:
            self.seen[tensor, step] = _joined(before, observation) if before else observation
        except ValueError as error:
            raise InputError(f"{tensor!r} at step {step} was seen with {error}; observe one bundle only") from None

    @property
    def tensors(self) -> list[str]:
        """The names of all tensors."""
        return sorted({tensor for tensor, _ in self.seen})

    def steps(self, tensor: str) -> list[int]:
        """The steps at which a tensor was seen."""
        return sorted(step for name, step in self.seen if name == tensor)

    def over(self, tensor: str, steps: Iterable[int] | None = None) -> Observation:
        """What was seen of a tensor at these steps, or at all."""
        chosen = self.steps(tensor) if steps is None else sorted(set(steps) & set(self.steps(tensor)))
        return reduce(_joined, (self.seen[tensor, step] for step in chosen))

    def write(self, path: Path, facts: Mapping[str, Any]) -> None:
        """Write the file, completely or not at all. `facts`: what was observed, values of JSON."""
        specs: dict[str, tuple[str, tuple[int, ...]]] = {}
        for tensor, observations in self._by_tensor():
            count = len(observations)
            shapes = {"steps": (count,), "range": (count, 2), "top": (count,), "counts": (count, 2, BINS)}
            specs |= {f"{tensor}:{part}": (TYPES[part], shape) for part, shape in shapes.items()}
            if (channels := next(iter(observations.values())).channels) is not None:
                specs[f"{tensor}:channels"] = ("float32", (count, *channels.shape))
        metadata = {name: json.dumps(value, sort_keys=True) for name, value in {**facts, "format": FORMAT}.items()}
        with writing(path) as temporary, temporary.open("wb") as file:
            file.write(safetensors_start(specs, metadata))
            for _, observations in self._by_tensor():
                for part in _parts(observations):
                    file.write(np.ascontiguousarray(part).data)

    def _by_tensor(self) -> Iterator[tuple[str, dict[int, Observation]]]:
        for tensor in self.tensors:
            yield tensor, {step: self.seen[tensor, step] for step in self.steps(tensor)}


def _parts(observations: Mapping[int, Observation]) -> Iterator[npt.NDArray[Any]]:
    """The arrays of one tensor, in the order of the file."""
    histograms = [o.histogram for o in observations.values()]
    yield np.array(list(observations), np.int32)
    yield np.array([(h.lowest, h.highest) for h in histograms], np.float32)
    yield np.array([h.top for h in histograms], np.int32)
    yield np.stack([h.counts for h in histograms])
    channels = [o.channels for o in observations.values() if o.channels is not None]
    if channels:
        yield np.stack(channels)


def read_observations(path: str | os.PathLike[str]) -> tuple[Observations, dict[str, Any]]:
    """The observations in a file, and what was observed."""
    path = Path(path)
    try:
        facts = {name: json.loads(text) for name, text in safetensors_metadata(path).items()}
        if facts.pop("format", None) != FORMAT:
            raise ValueError
        tensors = read_tensors(path)
        seen: dict[tuple[str, int], Observation] = {}
        for name in [n.removesuffix(":steps") for n in tensors if n.endswith(":steps")]:
            steps, ranges, tops, counts = (tensors[f"{name}:{part}"] for part in TYPES)
            channels = tensors.get(f"{name}:channels", [None] * len(steps))
            if counts.shape[1:] != (2, BINS) or (counts < 0).any():
                raise ValueError
            for step, (lowest, highest), top, count, amax in zip(steps, ranges, tops, counts, channels, strict=True):
                histogram = Histogram(float(lowest), float(highest), int(top), np.array(count))
                seen[name, int(step)] = Observation(histogram, None if amax is None else np.array(amax))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except (BundleError, KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise InputError(f"{path} is damaged or holds no statistics; collect them again") from None
    return Observations(seen), facts
