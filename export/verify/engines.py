"""Comparing engines with eager PyTorch on the same inputs: every call of a restoration, and the picture at the end.

A component whose outputs are choices (integers) must make the same choices. A choice may differ if the two best scores
differ by less than their rounding; values that follow from a different choice are not compared.
"""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tilewright.export.verify.eager import eager_network
from tilewright.export.verify.gate import RELATIVE_L2_GATE, fault_of
from tilewright.export.verify.memory import VERIFY_COPIES
from tilewright.export.verify.paired import Paired, difference
from tilewright.export.verify.repeat import Calls, Watched, commands
from tilewright.export.verify.sample import (
    SMALL_SEAM_STEPS,
    example_inputs,
    few_steps,
    one_tile,
    sample_photo,
    small_job,
)
from tilewright.export.verify.seams import PICTURES, SEAM_GATE, seams_of
from tilewright.export.verify.speed import seconds_of
from tilewright.runtime.bundle.manifest import PRECISIONS
from tilewright.runtime.bundle.measured import PSNR_GATE
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.engines.choose import choose_all
from tilewright.runtime.engines.choose import require as require_engines
from tilewright.runtime.engines.machine import processor, this_machine, usable_cores
from tilewright.runtime.engines.trust import strangers
from tilewright.runtime.errors import ResourceError, TilewrightError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.inputs import gather
from tilewright.runtime.memory.machine import available_bytes
from tilewright.runtime.restore import Restorer, load

__all__ = ["PARTS", "runnable", "verify"]

SEAM_STEPS = 4  # sampling steps when seams are judged; each step joins the tiles
SMALL = 2**24  # a bundle with fewer parameters is small
PARTS = (
    "engines and eager",
    "engines",
    *(f"seams, {name}" for name in (*PICTURES, "photo")),
)  # parts of a verification, for progress
Report = Callable[[str, int, int], None]  # called with one of PARTS, and the finished and total amount of it


def verify(
    root: Path,
    *,
    weights_dir: Path | None = None,
    size_px: int | None = None,
    expect: str | None = None,
    fresh: bool = True,
    on_progress: Report = lambda part, done, total: None,
) -> dict[str, Any]:
    """Compare a bundle's engines with the networks that they were traced from, and return a report.

    With `fresh` the digest of every file is computed anew. The picture is a square of `size_px` in the program's tiles,
    or by default a small picture in smaller tiles.
    """
    bundle = read_bundle(root, expect=expect, fresh=fresh)
    names, skipped = runnable(bundle)
    small = _parameters(bundle) < SMALL
    # in a small network, threads would mostly wait for each other, so tiles run at the same time instead
    threads, devices = (1, [f"cpu:{i}" for i in range(usable_cores())]) if small else (0, ["cpu:0"])
    _require_memory(bundle, len(names))
    with _torch_threads(threads), contextlib.ExitStack() as stack:
        restorers = {
            name: stack.enter_context(
                load(bundle, engine=name, threads=threads, devices=devices, weights_dir=weights_dir)
            )
            for name in names
        }
        judge, program = restorers[names[0]], bundle.program
        pairs = {
            n: Paired(_alike(restorers, n), eager_network(bundle, n, weights_dir)) for n in sorted(program.components())
        }
        job = small_job(judge, size_px)
        job.inputs = gather(bundle, example_inputs(bundle))
        calls = Calls()
        with _repeatable(root, calls):
            watched = {n: Watched(pair, n, calls) for n, pair in pairs.items()}
            eager_image = run(program, watched, judge.constants, _told(job, on_progress, PARTS[0], program))
            images, seconds = {}, {}
            for i, (name, restorer) in enumerate(restorers.items()):  # after a call of each size, as the first is slow
                timed = _told(job, on_progress, PARTS[1], program, i, len(restorers))
                watched = {n: Watched(engine, n, calls) for n, engine in restorer.engines.items()}
                images[name] = run(program, watched, restorer.constants, timed)
                seconds[name] = timed.seconds
        threads, megapixels = judge.threads, eager_image.shape[1] * eager_image.shape[2] / 1e6
        if small and len(names) > 1:  # above, each had one thread and small tiles
            tile = one_tile(judge, job.inputs)
            threads, seconds = seconds_of(bundle, names, tile, weights_dir)
            megapixels = tile.image.shape[1] * tile.image.shape[2] / 1e6
        few = few_steps(judge, SMALL_SEAM_STEPS if small else SEAM_STEPS)
        pictures = (PICTURES | {"photo": partial(sample_photo, scale=1)}).items()
        seams = {
            name: seams_of(judge, _told(job, on_progress, f"seams, {name}", program), few, make)
            for name, make in pictures
        }
        specs = {name: next(s for s in r.specs.values() if s.name == name) for name, r in restorers.items()}
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "reference": f"torch {torch.__version__} eager, float32",
        "image": f"{job.image.shape[2]}x{job.image.shape[1]} px in tiles of {job.tile_px or 'the program'}",
        "steps": job.steps or max(p.steps.count if p.steps else 1 for p in program.passes),
        "processor": processor(),
        "threads": threads,
        "engines": {
            name: {
                "backend": spec.backend,
                "version": backend(spec.backend).version(),
                "precision": spec.precision,
                "components": {
                    component: pair.report(name)
                    | {"seconds_per_megapixel": seconds[name].get(component, 0) / megapixels}
                    | {"shapes": calls.last.get(component, {})}
                    for component, pair in pairs.items()
                    if name in pair.engines
                },
                "restore": difference(images[name], eager_image) | {"deviation": float(images[name].std())},
            }
            for name, spec in specs.items()
        },
        "skipped": skipped,
        "seams": seams,
        "gate": {"relative_l2": RELATIVE_L2_GATE, "psnr_db": PSNR_GATE, "seam_excess": SEAM_GATE},
    }
    for engine in report["engines"].values():
        engine["fault"] = fault_of(engine)
    return report


@contextlib.contextmanager
def _repeatable(root: Path, calls: Calls) -> Iterator[None]:
    """Add to an error the commands that repeat the first call that failed."""
    try:
        yield
    except TilewrightError as error:
        for component, shapes in [*calls.failed.items()][:1]:
            error.repeat = commands(root, component, shapes)
        raise


def runnable(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """The names of the engines that can run here, the most accurate precision first, and for the others why not."""
    components = {name: bundle.manifest.components[name] for name in bundle.program.components()}
    specs = {spec.name: spec for component in components.values() for spec in component.engines}
    machine = this_machine({package for spec in specs.values() for package in spec.needs.packages})
    choices = choose_all(components, machine, strange=strangers(bundle.manifest))
    skipped = {name: reason for choice in choices.values() for name, reason in choice.misfits.items()}
    names = sorted(specs.keys() - skipped.keys(), key=lambda name: (PRECISIONS.index(specs[name].precision), name))
    if not names:
        require_engines(choices)
    return names, dict(sorted(skipped.items()))


def _alike(restorers: Mapping[str, Restorer], component: str) -> dict[str, Engine]:
    """The engines of a component, without those that stand in for an engine that the component lacks."""
    return {name: r.engines[component] for name, r in restorers.items() if r.specs[component].name == name}


def _told(job: Job, report: Report, part: str, program: Program, index: int = 0, count: int = 1) -> Job:
    """The job with times of its own. It reports its progress as the part with this index of so many."""
    percent = _percent(report, part, program, index, count)
    return replace(job, seconds={}, on_progress=percent)


def _percent(report: Report, part: str, program: Program, index: int, count: int) -> Report:
    """Report the finished share of one of `count` restorations, as if all passes took the same time."""
    names = [p.name for p in program.passes]

    def tell(name: str, done: int, total: int) -> None:
        share = (names.index(name) + done / total) / len(names)
        report(part, round(100 * (index + share) / count), 100)

    return tell


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parameters(bundle: Bundle) -> int:
    return sum(math.prod(r.shape) for references in bundle.weights.tensors.values() for r in references.values())


def _require_memory(bundle: Bundle, engines: int) -> None:
    """Refuse early if memory is too small: the system would kill the process."""
    needed, free = 4 * (VERIFY_COPIES + engines - 1) * _parameters(bundle), available_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"{bundle.root}: verifying needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are"
            " free; use a larger machine"
        )
