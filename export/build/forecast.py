"""Which stages a build would run, and the disk and memory that they would take."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import Stage
from tilewright.export.build.parameters import Shapes, count
from tilewright.export.build.request import Request
from tilewright.export.system import Rows
from tilewright.export.verify.memory import VERIFY_COPIES
from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.estimate import available_bytes

__all__ = ["Forecast", "forecast", "unverifiable"]

GRAPH_BYTES = 5_000_000  # all graphs of a system, at most
TRACE_BYTES = 1_200_000_000  # what tracing holds at its peak, with room; 0.6 GB was measured on hitoksr full


@dataclass(frozen=True)
class Forecast:
    """What a build would take."""

    stages: list[str]
    disk: dict[Path, int]  # the cache and the bundle, which may lie on two disks
    memory: int

    def to_json(self) -> dict[str, Any]:
        """For people and programs."""
        return {
            "stages": self.stages,
            "disk_bytes": sum(self.disk.values()),
            "disk": {str(place): size for place, size in self.disk.items()},
            "peak_memory_bytes": self.memory,
        }


def forecast(request: Request, plan: Iterable[Stage], *, up_to_date: bool) -> Forecast:
    """Predict a build of which the finished stages stay as they are."""
    run = [] if up_to_date else [s.name for s in plan if s.name == "seal" or not s.directory.is_dir()]
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
    return Forecast(run, disk, max((peaks.get(name, 0) for name in run), default=0))


def _written(request: Request, parameters: Mapping[str, Shapes]) -> int:
    """Bytes of the weights that a build writes, each once: random ones, merged ones, and packed copies."""
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
    """Why engines are not compared with eager PyTorch though nobody forbade it; none when they are."""
    if request.verify != "auto":
        return None
    if request.stand_in:
        return "the weights are stand-ins"
    needed, there = _verify_bytes(request), available_bytes()
    if there is not None and needed > there:
        return f"it needs about {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} GiB are free"
    return None


def _verify_bytes(request: Request) -> int:
    return VERIFY_COPIES * 4 * count({name: request.parameters[name] for name in request.components}) + TRACE_BYTES
