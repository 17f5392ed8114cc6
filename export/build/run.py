"""Running a build. The key of a stage is the digest of its inputs, and each key runs once.

A stage fills a directory that appears in the cache under its key when it is complete. So a repeated build does nothing,
a killed build loses only its current stage, a changed input runs only the stages that depend on it, and two builds at
the same time share their results.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from tilewright.export.build.cache import Stage, filling, staging, write
from tilewright.export.build.forecast import forecast, unverifiable
from tilewright.export.build.history import note_of, remember
from tilewright.export.build.preflight import check_request, check_room
from tilewright.export.build.request import Request
from tilewright.export.build.stage_list import all_remembered, list_stages
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import BundleError
from tilewright.runtime.memory.machine import peak_bytes, reset_peak

__all__ = ["Cost", "build", "changes", "up_to_date"]

log = logging.getLogger("tilewright")
Cost = dict[str, dict[str, float]]  # stage -> seconds and peak_bytes
Report = Callable[[str, str, float], None]  # called with a stage, its event, and seconds


def build(
    request: Request,
    on_stage: Report = lambda name, event, seconds: None,
    digest: Callable[[Path], str] = sha256_of_file,
    added: str | None = None,
) -> Cost:
    """Run the stages that are not finished, put the bundle in place, and return the cost of each stage that ran.

    `added`: the digest of all that engines depend on which are added to the bundle later. If it has them from the last
    time, nothing runs.
    """
    unread = not all_remembered(request)
    if unread:  # check files before reading gigabytes for the keys of stages
        check_request(request)
    stages = list_stages(request, digest)
    if up_to_date(request, stages, added):
        return {}
    if not unread:
        check_request(request)
    skipped = unverifiable(request)
    check_room(forecast(request, stages, up_to_date=False))
    cost: Cost = {}
    for stage in stages:
        log.debug("%s is keyed by %s", stage.directory, json.dumps(stage.inputs, indent=1))
        if stage.name == "verify" and skipped and not stage.directory.is_dir():
            on_stage(stage.name, f"skipped: {skipped}", 0.0)
        elif (spent := _run(request, stage, on_stage, cost)) is not None:
            cost[stage.name] = spent
    inputs = {stage.name: stage.inputs for stage in stages}
    seconds = {stage: spent["seconds"] for stage, spent in cost.items()}
    remember(request, read_bundle(request.out).digest, inputs, seconds)
    return cost


def _run(request: Request, stage: Stage, on_stage: Report, before: Cost) -> dict[str, float] | None:
    """Run a stage and return its cost; none if it was finished already."""
    sealing = stage.name == "seal"
    waiting = lambda: on_stage(stage.name, "waits for another build", 0.0)  # noqa: E731
    with staging(request.out.resolve()) if sealing else filling(stage.directory, waiting) as folder:
        if folder is None:
            os.utime(stage.directory)  # so that `clean --older-than` keeps directories in use
            on_stage(stage.name, "cached", 0.0)
            return None
        on_stage(stage.name, "started", 0.0)
        start = time.perf_counter()
        reset_peak()
        if sealing:  # written before the bundle appears, as another build may replace the bundle at once
            write(folder / "reports" / "build.json", json.dumps(before, indent=2, sort_keys=True) + "\n")
        stage.work(folder)
        spent = {"seconds": time.perf_counter() - start, "peak_bytes": float(peak_bytes())}
    on_stage(stage.name, "done", spent["seconds"])
    return spent


def up_to_date(request: Request, stages: list[Stage], added: str | None = None) -> bool:
    """Whether the existing bundle is complete and equals the result of these stages, and has what was added to it."""
    try:
        note = json.loads(note_of(request.out).read_text())
        if note["stages"] != {s.name: s.inputs for s in stages} or (added and note["added"]["inputs"] != added):
            return False
        if read_bundle(request.out).digest != (note["added"] if added else note)["digest"]:
            return False
        verified = (request.out / "reports" / "accuracy.json").is_file() or request.verify == "never"
        return verified or unverifiable(request) is not None
    except (OSError, ValueError, KeyError, TypeError, BundleError):
        return False


def changes(request: Request, stages: list[Stage]) -> dict[str, list[str]]:
    """For each stage that would run, the inputs that changed since the last build of this output."""
    try:
        note = json.loads(note_of(request.out).read_text())["stages"]
    except (OSError, ValueError, KeyError, TypeError):
        note = {}
    reasons: dict[str, list[str]] = {}
    for stage in stages:
        before = note.get(stage.name)
        if before is None:
            reasons[stage.name] = ["no earlier build of this output"]
        elif before != stage.inputs:
            reasons[stage.name] = sorted(
                k for k in before.keys() | stage.inputs.keys() if before.get(k) != stage.inputs.get(k)
            )
        elif not (request.out / "bundle.json").is_file():
            reasons[stage.name] = ["the bundle is missing"]
    return reasons
