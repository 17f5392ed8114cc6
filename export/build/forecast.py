"""Predicting a build: the stages that would run, and the disk, memory and time that they need."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import Stage
from tilewright.export.build.history import usual_seconds
from tilewright.export.build.parameters import Shapes, count
from tilewright.export.build.request import Request
from tilewright.export.system import Rows
from tilewright.export.verify.memory import VERIFY_COPIES
from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.memory.machine import available_bytes

__all__ = ["Forecast", "forecast", "unverifiable"]

GRAPH_BYTES = 5_000_000  # the most that all graphs of a system need
TRACE_BYTES = 1_200_000_000  # the peak of tracing, with room: 0.6 GB was measured on hitoksr full


@dataclass(frozen=True)
class Forecast:
    """The stages, disk, memory and time of a build."""

    stages: list[str]
    disk: dict[Path, int]  # bytes under the cache and under the bundle, which may be on different disks
    memory: int
    seconds: dict[str, float]  # stage -> the time it took in a build of like size; some are not known

    def to_json(self) -> dict[str, Any]:
        """The forecast as plain values."""
        return {
            "stages": self.stages,
            "disk_bytes": sum(self.disk.values()),
            "disk": {str(place): size for place, size in self.disk.items()},
            "peak_memory_bytes": self.memory,
            "seconds": {name: self.seconds.get(name) for name in self.stages},
        }


def forecast(request: Request, stages: Iterable[Stage], *, up_to_date: bool) -> Forecast:
    """Predict a build. Finished stages do not run again."""
    run = [] if up_to_date else [s.name for s in stages if s.name == "seal" or not s.directory.is_dir()]
    if "verify" in run and unverifiable(request):
        run.remove("verify")
    disk = {}
    if {"attach", "trace", "optimise"} & set(run):
        disk[cache_dir()] = GRAPH_BYTES
        if "attach" in run:
            disk[cache_dir()] += _written(request, request.parameters)
    if "seal" in run:
        graphs = {name: request.parameters[name] for name in request.components}
        disk[request.out] = GRAPH_BYTES + _written(request, graphs)
    peaks = {"trace": TRACE_BYTES, "verify": _verify_bytes(request)}
    usual = usual_seconds(request)
    seconds = {name: usual[name] for name in run if name in usual}
    return Forecast(run, disk, max((peaks.get(name, 0) for name in run), default=0), seconds)


def _written(request: Request, parameters: Mapping[str, Shapes]) -> int:
    """The bytes of weights that a build writes: random weights, merged weights and packed copies, each once."""
    system, sizes = request.system, dict[tuple[str, Any], int]()
    for component, shapes in parameters.items():
        for name, shape in shapes.items():
            origin, keys = system.origin_of(component, name), system.keys(component, name)
            tensors = request.used.get(origin)
            numbers = math.prod(shape)
            if tensors is None:
                sizes[origin, keys[0]] = 4 * numbers
                continue
            names = [key.key if isinstance(key, Rows) else key for key in keys]
            stored = next((tensors.tensors[key] for key in names if key in tensors.tensors), None)
            if stored is not None and (request.pack or _merged(request, component, name)):
                sizes[origin, keys[0]] = stored.length * numbers // max(1, math.prod(stored.shape))
    return sum(sizes.values())


def _merged(request: Request, component: str, parameter: str) -> bool:
    lora = request.settings.lora
    stem = parameter.removesuffix("weight")
    if not lora or not lora.merged or stem == parameter:
        return False
    key = request.system.keys(component, f"{stem}lora_A")[0]
    return isinstance(key, str) and key.removesuffix(".lora_A") in lora.branches


def unverifiable(request: Request) -> str | None:
    """The reason why `--verify auto` does not compare engines with eager PyTorch; none if it does."""
    if request.verify != "auto":
        return None
    if request.stand_in:
        return "the weights are stand-ins"
    needed, free = _verify_bytes(request), available_bytes()
    if free is not None and needed > free:
        return f"it needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are free"
    return None


def _verify_bytes(request: Request) -> int:
    copies = VERIFY_COPIES + len(request.engines) - 1
    return copies * 4 * count({name: request.parameters[name] for name in request.components}) + TRACE_BYTES
