"""Runs a build: a stage is keyed by the digest of everything it depends on, and is done once.

A stage fills a directory that appears in the cache, complete, under its key; one that is there is never made again. So
a repeated build does nothing, a killed one loses only the stage it was in, a changed input runs what it touches, and
of two builds at once the slower takes what the faster has made.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from tilewright.export.build.cache import Stage, filling, staging, write
from tilewright.export.build.forecast import forecast, unverifiable
from tilewright.export.build.plan import all_remembered, stages
from tilewright.export.build.preflight import check_files, check_room
from tilewright.export.build.request import Request
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import BundleError
from tilewright.runtime.estimate import peak_bytes, reset_peak

__all__ = ["Cost", "build", "changes", "note_of", "up_to_date"]

log = logging.getLogger("tilewright")
Cost = dict[str, dict[str, float]]  # stage -> seconds and peak_bytes
Report = Callable[[str, str, float], None]  # is told a stage, what happens to it, and seconds


def build(
    request: Request,
    on_stage: Report = lambda name, event, seconds: None,
    digest: Callable[[Path], str] = sha256_of_file,
) -> Cost:
    """Run what is not done yet and put the bundle in place; the cost of each stage that ran."""
    unread = not all_remembered(request)
    if unread:  # reading gigabytes to find a stage's key can wait until the files are known good
        check_files(request)
    plan = stages(request, digest)
    if up_to_date(request, plan):
        return {}
    if not unread:
        check_files(request)
    skipped = unverifiable(request)
    check_room(forecast(request, plan, up_to_date=False))
    cost: Cost = {}
    for stage in plan:
        log.debug("%s is keyed by %s", stage.directory, json.dumps(stage.inputs, indent=1))
        if stage.name == "verify" and skipped and not stage.directory.is_dir():
            on_stage(stage.name, f"skipped: {skipped}", 0.0)
        elif (spent := _run(request, stage, on_stage, cost)) is not None:
            cost[stage.name] = spent
    made = {"bundle": str(request.out.resolve()), "digest": read_bundle(request.out).digest}
    write(note_of(request.out), json.dumps(made | {"stages": {s.name: s.inputs for s in plan}}, sort_keys=True))
    return cost


def _run(request: Request, stage: Stage, on_stage: Report, before: Cost) -> dict[str, float] | None:
    """What a stage cost, or none where it was done before."""
    sealing = stage.name == "seal"
    waiting = lambda: on_stage(stage.name, "waits for another build", 0.0)  # noqa: E731
    with staging(request.out.resolve()) if sealing else filling(stage.directory, waiting) as folder:
        if folder is None:
            os.utime(stage.directory)  # so that `clean --older-than` spares what is in use
            on_stage(stage.name, "cached", 0.0)
            return None
        on_stage(stage.name, "started", 0.0)
        start = time.perf_counter()
        reset_peak()
        if sealing:  # inside the bundle from the first, as another build may replace it as soon as it is there
            write(folder / "reports" / "build.json", json.dumps(before, indent=2, sort_keys=True) + "\n")
        stage.work(folder)
        spent = {"seconds": time.perf_counter() - start, "peak_bytes": float(peak_bytes())}
    on_stage(stage.name, "done", spent["seconds"])
    return spent


def up_to_date(request: Request, plan: list[Stage]) -> bool:
    """Whether the bundle in place is what this plan would make, and whole."""
    try:
        made = json.loads(note_of(request.out).read_text())
        if made["stages"] != {s.name: s.inputs for s in plan} or read_bundle(request.out).digest != made["digest"]:
            return False
        verified = (request.out / "reports" / "accuracy.json").is_file() or request.verify == "never"
        return verified or unverifiable(request) is not None
    except (OSError, ValueError, KeyError, TypeError, BundleError):
        return False


def changes(request: Request, plan: list[Stage]) -> dict[str, list[str]]:
    """For each stage that would run, the inputs that differ from the last build of this output."""
    try:
        made = json.loads(note_of(request.out).read_text())["stages"]
    except (OSError, ValueError, KeyError, TypeError):
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


def note_of(out: Path) -> Path:
    """Where the last build of an output is remembered."""
    return cache_dir() / "built" / f"{sha256_of_bytes(str(out.resolve()).encode())[:32]}.json"
