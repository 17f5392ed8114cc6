"""The verbs of `tilewright runtime`: restore, serve, plan, simulate, select, doctor, profile."""

import argparse
from pathlib import Path
from typing import Any

from tilewright.cli.bundle_arguments import bundle_arguments
from tilewright.cli.engine_arguments import engine_argument, load_arguments, note_large_tile
from tilewright.cli.profile import profile, profile_arguments
from tilewright.cli.restore import restore, restore_arguments
from tilewright.cli.serve import serve, serve_arguments
from tilewright.cli.simulate import simulate, simulate_arguments
from tilewright.cli.terminal import answer, expect_argument, verb
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import UsageError
from tilewright.runtime.memory.estimate import estimate
from tilewright.runtime.memory.machine import bytes_of
from tilewright.runtime.setup import set_up

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs restore, serve, plan, simulate, select, doctor and profile."""
    restore_arguments(verb(verbs, "restore", "restore an image, or every image of a folder", restore))
    serve_arguments(verb(verbs, "serve", "restore images over HTTP", serve))

    plan = verb(verbs, "plan", "tiles and memory for an image size; nothing is run", _plan)
    plan.add_argument("width", type=int, help="of the input image")
    plan.add_argument("height", type=int)
    bundle_arguments(plan)
    load_arguments(plan)
    plan.add_argument("--scale", type=int, metavar="N", help="as for restore")

    bundle_arguments(simulate_arguments(verb(verbs, "simulate", "time on several devices; nothing is run", simulate)))

    select = verb(verbs, "select", "the best of several restorations of one image, by scores of quality", _select)
    select.add_argument("candidates", nargs="+", type=Path, metavar="IMAGE", help="in the order of their rounds")
    select.add_argument("--scores", type=Path, required=True, metavar="CSV", help="image,METRIC,...; higher is better")

    doctor = verb(verbs, "doctor", "the devices here, and the engines that would run on them", _doctor)
    doctor.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="its directory (default: no engines)")
    engine_argument(doctor)
    expect_argument(doctor)

    summary = "measure time and memory for sizes and settings, or compare two measurements"
    profile_arguments(verb(verbs, "profile", summary, profile, json_file=True))


def _plan(arguments: argparse.Namespace) -> None:
    bundle = read_bundle(arguments.bundle, expect=arguments.expect)
    note_large_tile(arguments, bundle.program)
    setup = set_up(
        bundle,
        engine=arguments.engine,
        devices=arguments.devices.split(","),
        threads=arguments.threads,
        batch=arguments.batch,
        tile=arguments.tile,
    )
    needs = estimate(
        setup.bundle,
        arguments.width,
        arguments.height,
        tile=arguments.tile,
        overlap=arguments.overlap,
        memory=arguments.memory,
        scale=arguments.scale,
        devices=len(setup.devices),
        shared=setup.shared,
        engines=setup.specs,
        memory_limit=None if arguments.memory_limit is None else bytes_of(arguments.memory_limit),
    )
    if needs.limited:
        needs.require()
    passes = [
        {
            "pass": p.name,
            "tiles": plan.count,
            "columns": len(plan.lefts),
            "rows": len(plan.tops),
            "tile": [plan.tile_width, plan.tile_height],
            "overlap": plan.overlap,
            "steps": p.steps.count if p.steps else 1,
        }
        for p, plan in needs.passes
    ]
    value = {
        "result": [needs.width, needs.height],
        "passes": passes,
        "needed_bytes": needs.needed_bytes,
        "mapped_bytes": needs.mapped_bytes,
        "available_bytes": needs.available_bytes,
    }
    rows = [
        f"{p['pass']:<12} {p['columns']}x{p['rows']} tiles of {p['tile'][0]}x{p['tile'][1]} px,"  # type: ignore[index]
        f" overlap {p['overlap']}, {p['steps']} step(s)"
        for p in passes
    ]
    free = "unknown" if needs.available_bytes is None else f"{needs.available_bytes / 2**30:.1f} GiB"
    mapped = f" besides {needs.mapped_bytes / 2**30:.2f} GiB of mapped weights" if needs.mapped_bytes else ""
    rows.append(f"memory: about {needs.needed_bytes / 2**30:.2f} GiB needed{mapped}, {free} free")
    answer(arguments, value, "\n".join([f"result: {needs.width}x{needs.height} px", *rows]))


def _select(arguments: argparse.Namespace) -> None:
    from tilewright.runtime.select import select

    choice = select(arguments.candidates, arguments.scores)
    best = arguments.candidates[choice.index]
    rows = [
        {"image": str(image), "rank_sum": rank_sum, "mean": mean}
        for image, rank_sum, mean in zip(arguments.candidates, choice.rank_sums, choice.means, strict=True)
    ]
    lines = [f"{r['image']}: sum of ranks {r['rank_sum']}, normalised mean {r['mean']:.3f}" for r in rows]
    answer(arguments, {"best": str(best), "candidates": rows}, "\n".join([*lines, f"best: {best}"]))


def _doctor(arguments: argparse.Namespace) -> None:
    from tilewright.runtime.doctor import diagnose, summary

    bundle = read_bundle(arguments.bundle, expect=arguments.expect) if arguments.bundle else None
    if bundle is None and arguments.engine:
        raise UsageError(f"--engine {arguments.engine} needs a bundle; name its directory")
    report, fault = diagnose(bundle, arguments.engine)
    answer(arguments, report, summary(report), fault=fault)
