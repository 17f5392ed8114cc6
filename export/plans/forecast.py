"""Compiling without having compiled: the memory, disk and time that plans, packages and graphs for GPUs need.

The factors are rules of thumb, not measurements: TensorRT holds weights twice while it tries kernels.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.errors import ResourceError, UsageError, amount

__all__ = [
    "GPUS",
    "NOTES",
    "CompiledForecast",
    "check_gpu",
    "check_host",
    "gpu_bytes",
    "graph_forecast",
    "package_forecast",
    "plan_forecast",
]

# architecture -> memory in GB of its smallest card for servers
GPUS = {"sm75": 16, "sm80": 40, "sm86": 24, "sm89": 24, "sm90": 80, "sm100": 180, "sm103": 270, "sm120": 32}
WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1, "fp8": 1}
COPIES = 2  # of a component's weights while its plan is compiled, on the host and on the GPU
PLAN_HOST_BYTES = 3_000_000_000  # Python and TensorRT with its library of kernels
PACKAGE_HOST_BYTES = 2_000_000_000  # PyTorch and a C++ compiler
DEVICE_BYTES = 1_500_000_000  # CUDA's context and the values inside of calls of a small tile
PLAN_BYTES = 30_000_000  # a plan without weights: code of kernels
PACKAGE_BYTES = 10_000_000  # 2 to 3 MB were measured for HiTokSR tiny
GRAPH_BYTES = 1_000_000
LIKE = 2.0  # a component is compared with those of at most so many times its parameters
NOTES = {"plans": "plan/*/inspected.json", "packages": "package/*/noted.json"}  # in the cache: what was compiled here


@dataclass(frozen=True)
class CompiledForecast:
    """What making all compiled engines of a target takes, and what running them takes."""

    made: str  # plans | packages | graphs
    count: int
    place: str  # a GPU, as sm90 or sm90:141, or the CPU
    host: int  # memory of the machine, while the largest component is compiled
    device: int  # memory of the GPU at the same time
    running: int  # memory of the GPU with all engines open
    device_memory: int | None  # of the GPU; none: it is not known, or the CPU runs them
    disk: int
    seconds: float | None  # none: nothing of a like size was compiled here for this place

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain values."""
        return {
            "gpu": self.place,
            self.made: self.count,
            "host_memory_bytes": self.host,
            "device_memory_bytes": self.device,
            "running_memory_bytes": self.running,
            "gpu_memory_bytes": self.device_memory,
            "disk_bytes": self.disk,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """The forecast as text."""
        lines = [f"{self.made}: {self.count} for {self.place}, {amount(self.disk)}, without weights"]
        gpu = [f"{amount(self.device)} while compiling"] if self.device else []
        gpu += [f"{amount(self.running)} with all engines open"] if self.running else []
        gpu += [f"{amount(self.device_memory)} on the card"] if self.device_memory else []
        lines += [f"GPU memory: {', '.join(gpu)}"] if gpu else []
        if self.host:
            unknown = f"unknown, no {self.made[:-1]} like these was compiled here"
            lines.append(f"memory of the machine that compiles: {amount(self.host)}")
            lines.append(f"time of compiling: {unknown if self.seconds is None else f'{self.seconds:.0f} s'}")
        return lines


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU that is named `sm90` or, with gigabytes, `sm90:141`."""
    name, _, size = gpu.partition(":")
    if name not in GPUS or not re.fullmatch(r"|[1-9]\d{0,3}", size) or gpu.endswith(":"):
        raise UsageError(f"gpu={gpu!r} is none of {', '.join(GPUS)}, with gigabytes behind a colon: sm90:141")
    return int(size or GPUS[name]) * 10**9


def plan_forecast(gpu: str, memory: int, parameters: Mapping[str, int], precisions: Sequence[str]) -> CompiledForecast:
    """Predict the plans of components with so many parameters, for a GPU with so much memory."""
    widest, largest, pairs = _sizes(parameters, precisions)
    return CompiledForecast(
        "plans",
        len(pairs),
        gpu,
        COPIES * WIDTHS["float32"] * largest + PLAN_HOST_BYTES,
        COPIES * widest * largest + DEVICE_BYTES,
        widest * sum(parameters.values()) + DEVICE_BYTES,
        memory,
        len(pairs) * PLAN_BYTES,
        _usual("plans", gpu.partition(":")[0], pairs),
    )


def package_forecast(
    gpu: str | None, memory: int | None, parameters: Mapping[str, int], precisions: Sequence[str]
) -> CompiledForecast:
    """Predict the packages of components, for a GPU or for the CPU. Weights are in memory only where they run."""
    _, _, pairs = _sizes(parameters, precisions)
    running = WIDTHS["float32"] * sum(parameters.values()) + DEVICE_BYTES if gpu else 0  # as their files store them
    disk, seconds = len(pairs) * PACKAGE_BYTES, _usual("packages", (gpu or "cpu").partition(":")[0], pairs)
    place, device = (gpu, DEVICE_BYTES) if gpu else ("the CPU", 0)
    return CompiledForecast("packages", len(pairs), place, PACKAGE_HOST_BYTES, device, running, memory, disk, seconds)


def graph_forecast(
    gpu: str | None, memory: int | None, parameters: Mapping[str, int], precisions: Sequence[str]
) -> CompiledForecast:
    """Predict the graphs for ONNX Runtime on a GPU. Nothing is compiled, and weights are as their files store them."""
    _, _, pairs = _sizes(parameters, precisions)
    running = WIDTHS["float32"] * sum(parameters.values()) + DEVICE_BYTES
    place = gpu or "any GPU"
    return CompiledForecast("graphs", len(pairs), place, 0, 0, running, memory, len(pairs) * GRAPH_BYTES, 0.0)


def check_gpu(predicted: CompiledForecast) -> None:
    """Refuse engines that do not fit on the GPU."""
    needed, what = (
        (predicted.device, "compiling for") if predicted.made == "plans" else (predicted.running, "running on")
    )
    if predicted.device_memory is not None and needed > predicted.device_memory:
        narrower = "leave out --precision float32, or " if predicted.made == "plans" else ""
        raise ResourceError(
            f"{what} {predicted.place} needs about {amount(needed)} of GPU memory, and such a card has"
            f" {amount(predicted.device_memory)}; {narrower}use a larger card: --gpu sm90:141"
        )


def check_host(predicted: CompiledForecast, free: int | None) -> None:
    """Refuse engines whose compilation does not fit into the memory of this machine."""
    if free is not None and predicted.host > free:
        raise ResourceError(
            f"compiling {predicted.made} needs about {amount(predicted.host)} of memory, and {amount(free)} are free;"
            " end other programs, or compile on a machine with more"
        )


def _sizes(parameters: Mapping[str, int], precisions: Sequence[str]) -> tuple[int, int, list[int]]:
    """The bytes of the widest number, the parameters of the largest component, and those of each engine."""
    engines = [count for count in parameters.values() for _ in (precisions if count else precisions[:1])]
    return max(WIDTHS[precision] for precision in precisions), max(parameters.values(), default=0), engines


def _usual(made: str, architecture: str, engines: Sequence[int]) -> float | None:
    """The seconds that the nearest in size of all engines took for this architecture."""
    usual = [_nearest(made, architecture, parameters) for parameters in engines]
    return None if None in usual else sum(filter(None, usual))


def _nearest(made: str, architecture: str, parameters: int) -> float | None:
    past = []
    for file in (cache_dir() / "build").glob(NOTES[made]):
        try:
            note = json.loads(file.read_text())
            size, seconds = max(1, note["parameters"]), float(note["seconds"])
            far = abs(math.log(size / max(1, parameters)))
            if note["architecture"] == architecture and far <= math.log(LIKE):
                past.append((far, seconds))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(past)[1] if past else None
