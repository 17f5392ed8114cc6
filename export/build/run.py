"""Runs a build: a stage is keyed by the digest of everything it depends on, and is done once.

A stage fills a directory that appears in the cache, complete, under its key; one that is there is never made again. So
a repeated build does nothing, a killed one loses only the stage it was in, and a changed input runs what it touches.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tilewright.export.build.request import VERIFY_COPIES, Request, parameter_count
from tilewright.export.build.stages import Stage, stages, staging, write
from tilewright.runtime.bundle import read
from tilewright.runtime.digests import cache_dir, sha256_of_bytes
from tilewright.runtime.errors import BundleError, ResourceError
from tilewright.runtime.memory import available_bytes, peak_bytes, reset_peak

__all__ = ["build", "changes", "clean", "forecast", "up_to_date"]

log = logging.getLogger("tilewright")
GRAPH_BYTES = 5_000_000  # all graphs of a system, at most
TRACE_BYTES = 1_200_000_000  # what tracing holds at its peak, with room; 0.6 GB was measured on hitoksr full


def build(
    request: Request, on_stage: Callable[[str, str, float], None] = lambda name, event, seconds: None
) -> dict[str, dict[str, float]]:
    """Run what is not done yet and put the bundle in place; seconds and peak bytes of each stage that ran."""
    plan = stages(request)
    if up_to_date(request, plan):
        return {}
    skipped = unverifiable(request, plan)
    _require_room(request, forecast(request, plan))
    cost: dict[str, dict[str, float]] = {}
    for stage in plan:
        log.debug("%s is keyed by %s", stage.directory, json.dumps(stage.inputs, indent=1))
        if stage.name != "seal" and stage.directory.is_dir():
            os.utime(stage.directory)  # so that `clean --older-than` spares what is in use
            on_stage(stage.name, "cached", 0.0)
            continue
        if stage.name == "verify" and skipped:
            on_stage(stage.name, f"skipped: {skipped}", 0.0)
            continue
        on_stage(stage.name, "started", 0.0)
        start = time.perf_counter()
        reset_peak()
        if stage.name == "seal":
            with staging(request.out) as folder:
                stage.work(folder)
        else:
            with staging(stage.directory) as folder:
                stage.work(folder)
                folder.rename(stage.directory)
        cost[stage.name] = {"seconds": time.perf_counter() - start, "peak_bytes": float(peak_bytes())}
        on_stage(stage.name, "done", cost[stage.name]["seconds"])
    write(request.out / "reports" / "build.json", json.dumps(cost, indent=2, sort_keys=True) + "\n")
    write(_note(request.out), json.dumps({s.name: s.inputs for s in plan}, sort_keys=True))
    return cost


def unverifiable(request: Request, plan: list[Stage]) -> str | None:
    """Why engines are not compared with eager PyTorch though nobody forbade it; none when they are."""
    if request.verify != "auto":
        return None
    if request.stand_in:
        return "the weights are stand-ins"
    needed, there = _verify_bytes(request, plan), available_bytes()
    if there is not None and needed > there:
        return f"it needs about {needed / 2**30:.0f} GiB of memory, {there / 2**30:.0f} GiB are free"
    return None


def _verify_bytes(request: Request, plan: list[Stage]) -> int:
    return VERIFY_COPIES * 4 * _parameters(request, plan) + TRACE_BYTES


def _parameters(request: Request, plan: list[Stage]) -> int:
    """How many there are: as traced, or counted on networks without storage, which takes seconds."""
    try:
        shapes = json.loads((plan[0].directory / "parameters.json").read_text())
    except OSError:
        return parameter_count(request)
    return sum(math.prod(shape) for of in shapes.values() for shape in of.values())


def up_to_date(request: Request, plan: list[Stage]) -> bool:
    """Whether the bundle in place is what this plan would make, and whole."""
    try:
        made = json.loads(_note(request.out).read_text())
        if made != {s.name: s.inputs for s in plan} or not read(request.out):
            return False
        verified = (request.out / "reports" / "accuracy.json").is_file() or request.verify == "never"
        return verified or unverifiable(request, plan) is not None
    except (OSError, ValueError, BundleError):
        return False


def changes(request: Request, plan: list[Stage]) -> dict[str, list[str]]:
    """For each stage that would run, the inputs that differ from the last build of this output."""
    try:
        made = json.loads(_note(request.out).read_text())
    except (OSError, ValueError):
        made = {}
    reasons: dict[str, list[str]] = {}
    for stage in plan:
        before = made.get(stage.name)
        if before is None:
            reasons[stage.name] = ["no earlier build of this output"]
        elif before != stage.inputs:
            reasons[stage.name] = sorted(
                k for k in before.keys() | stage.inputs.keys() if before.get(k) != stage.inputs.get(k)
            )
        elif not (request.out / "bundle.json").is_file():
            reasons[stage.name] = ["the bundle is not in place"]
    return reasons


def forecast(request: Request, plan: list[Stage]) -> dict[str, Any]:
    """Which stages would run, and the disk and memory they would take."""
    run = [s.name for s in plan if s.name == "seal" or not s.directory.is_dir()]
    run = [] if up_to_date(request, plan) else run
    if "verify" in run and unverifiable(request, plan):
        run.remove("verify")
    given = sum(r.length for tensors in request.used.values() for r in tensors.tensors.values())
    random = 4 * _parameters(request, plan) if request.seed is not None and "attach" in run else 0
    copied = (given if request.pack or request.settings.get("merged") else 0) + random
    disk = (GRAPH_BYTES + copied) * len({"attach", "optimise", "seal"} & set(run))
    peaks = {"trace": TRACE_BYTES, "verify": _verify_bytes(request, plan) if "verify" in run else 0}
    memory = max(peaks.get(stage, 0) for stage in [*run, ""])
    return {"stages": run, "disk_bytes": disk, "peak_memory_bytes": memory}


def _require_room(request: Request, predicted: dict[str, Any]) -> None:
    disk, free = predicted["disk_bytes"], shutil.disk_usage(_existing(request.out)).free
    if disk > free:
        raise ResourceError(f"{request.out}: needs {disk / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; make room")
    memory, there = predicted["peak_memory_bytes"], available_bytes()
    if there is not None and memory > there:
        raise ResourceError(
            f"stages {', '.join(predicted['stages'])} need about {memory / 2**30:.1f} GiB of memory,"
            f" {there / 2**30:.1f} GiB are free; use --verify never, or a larger machine"
        )


def clean(older_than_days: float = 0.0) -> int:
    """Remove cached stages, all or those not used for some days; how many bytes that freed."""
    freed = 0
    limit = time.time() - older_than_days * 86_400
    for folder in sorted((cache_dir() / "build").glob("*/*")):
        if folder.stat().st_mtime <= limit:
            freed += sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            shutil.rmtree(folder)
    return freed


def _note(out: Path) -> Path:
    """Where the inputs of the last build of an output are remembered."""
    return cache_dir() / "built" / f"{sha256_of_bytes(str(out.resolve()).encode())[:32]}.json"


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
