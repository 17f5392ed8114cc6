"""Predicting the compilation of plans for a GPU that need not be here: memory, disk and time.

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

__all__ = ["GPUS", "PlanForecast", "check_gpu", "check_host", "gpu_bytes", "plan_forecast"]

# architecture -> memory in GB of its smallest card for servers
GPUS = {"sm75": 16, "sm80": 40, "sm86": 24, "sm89": 24, "sm90": 80, "sm100": 180, "sm103": 270, "sm120": 32}
WIDTHS = {"float32": 4, "bfloat16": 2, "int8": 1, "fp8": 1}
COPIES = 2  # of a component's weights while its plan is compiled, on the host and on the GPU
HOST_BYTES = 3_000_000_000  # Python and TensorRT with its library of kernels
DEVICE_BYTES = 1_500_000_000  # CUDA's context and the values inside of calls of a small tile
PLAN_BYTES = 30_000_000  # a plan without weights: code of kernels
LIKE = 2.0  # a plan is compared with those of at most so many times its parameters


@dataclass(frozen=True)
class PlanForecast:
    """What compiling all plans takes, and what running them takes."""

    gpu: str
    plans: int
    host: int
    device: int  # while the largest component is compiled
    running: int  # with all engines open
    device_memory: int  # of the GPU
    disk: int
    seconds: float | None  # none: no plan of a like size was compiled here for this architecture

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain values."""
        return {
            "gpu": self.gpu,
            "plans": self.plans,
            "host_memory_bytes": self.host,
            "device_memory_bytes": self.device,
            "running_memory_bytes": self.running,
            "gpu_memory_bytes": self.device_memory,
            "disk_bytes": self.disk,
            "seconds": self.seconds,
        }

    def lines(self) -> list[str]:
        """The forecast as text."""
        time = "unknown, no plan like these was compiled here" if self.seconds is None else f"{self.seconds:.0f} s"
        return [
            f"plans: {self.plans} for {self.gpu}, {amount(self.disk)}, without weights",
            f"GPU memory: {amount(self.device)} while compiling, {amount(self.running)} with all engines open,"
            f" {amount(self.device_memory)} on the card",
            f"memory of the machine with the GPU: {amount(self.host)}",
            f"time of compiling: {time}",
        ]


def gpu_bytes(gpu: str) -> int:
    """The memory of a GPU that is named `sm90` or, with gigabytes, `sm90:141`."""
    name, _, size = gpu.partition(":")
    if name not in GPUS or not re.fullmatch(r"|[1-9]\d{0,3}", size) or gpu.endswith(":"):
        raise UsageError(f"gpu={gpu!r} is none of {', '.join(GPUS)}, with gigabytes behind a colon: sm90:141")
    return int(size or GPUS[name]) * 10**9


def plan_forecast(gpu: str, memory: int, parameters: Mapping[str, int], precisions: Sequence[str]) -> PlanForecast:
    """Predict the plans of components with so many parameters, for a GPU with so much memory."""
    architecture = gpu.partition(":")[0]
    widest = max(WIDTHS[precision] for precision in precisions)
    largest = max(parameters.values(), default=0)
    pairs = [(count, p) for count in parameters.values() for p in (precisions if count else precisions[:1])]
    usual = [_usual(architecture, count) for count, _ in pairs]
    return PlanForecast(
        gpu,
        len(pairs),
        COPIES * WIDTHS["float32"] * largest + HOST_BYTES,
        COPIES * widest * largest + DEVICE_BYTES,
        widest * sum(parameters.values()) + DEVICE_BYTES,
        memory,
        len(pairs) * PLAN_BYTES,
        None if None in usual else sum(filter(None, usual)),
    )


def check_gpu(predicted: PlanForecast) -> None:
    """Refuse plans that do not fit on the GPU."""
    if predicted.device > predicted.device_memory:
        raise ResourceError(
            f"compiling for {predicted.gpu} needs about {amount(predicted.device)} of GPU memory, and such a card has"
            f" {amount(predicted.device_memory)}; leave out --precision float32, or use a larger card: --gpu sm90:141"
        )


def check_host(predicted: PlanForecast, free: int | None) -> None:
    """Refuse plans that do not fit into the memory of this machine, where they are compiled."""
    if free is not None and predicted.host > free:
        raise ResourceError(
            f"compiling plans needs about {amount(predicted.host)} of memory, and {amount(free)} are free; end other"
            " programs, or compile on a machine with more"
        )


def _usual(architecture: str, parameters: int) -> float | None:
    """The seconds that the plan nearest in size took for this architecture."""
    past = []
    for file in (cache_dir() / "build" / "plan").glob("*/inspected.json"):
        try:
            note = json.loads(file.read_text())
            size, seconds = max(1, note["parameters"]), float(note["seconds"])
            far = abs(math.log(size / max(1, parameters)))
            if note["architecture"] == architecture and far <= math.log(LIKE):
                past.append((far, seconds))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return min(past)[1] if past else None
