"""The verbs of `tilewright calib`."""

import argparse
import time
from pathlib import Path
from typing import Any

from tilewright.cli.bundle_arguments import own_arguments, own_values
from tilewright.cli.judged import FRONTIER, report_text, tell_gate
from tilewright.cli.terminal import Progress, answer, expect_argument, mebibytes, table, verb
from tilewright.runtime.bundle.read import require_bundle
from tilewright.runtime.memory.estimate import MEMORY_MODES
from tilewright.runtime.memory.machine import peak_bytes

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs of the group."""
    collect = verb(
        verbs, "collect", "restore images, and write statistics of the numbers inside the networks", _collect
    )
    collect.add_argument("bundle", type=Path, metavar="BUNDLE")
    collect.add_argument(
        "images_dir", type=Path, metavar="IMAGES_DIR", help="a folder of images as they come, before restoration"
    )
    collect.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="a safetensors file")
    collect.add_argument("--images", type=int, metavar="N", default=16, help="most images to take (default: 16)")
    collect.add_argument("--steps", type=int, metavar="N", help="sampling steps, where the system has any")
    collect.add_argument("--seed", type=int, metavar="N", default=0, help="of the first image's noise (default: 0)")
    collect.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in output pixels, instead of the bundle's"
    )
    collect.add_argument(
        "--via",
        choices=("engines", "torch"),
        default="engines",
        help="run the bundle's graphs, or the PyTorch networks that they were traced from (default: engines)",
    )
    collect.add_argument(
        "--memory", choices=MEMORY_MODES, default="fast", help="speed, or weights mapped and not copied"
    )
    collect.add_argument("--threads", type=int, metavar="N", default=0, help="of an engine (default: all cores)")
    collect.add_argument(
        "--devices", default="cpu:0", metavar="NAMES", help="run tiles at once on cpu:0,cpu:1,... (default: cpu:0)"
    )
    collect.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")
    expect_argument(collect)
    collect.epilog = "A bundle has arguments of its own: BUNDLE --help lists them."
    collect.set_defaults(more_arguments=own_arguments)

    sens = verb(verbs, "sensitivity", "judge which layers cost the picture most in 8 bits", _sensitivity)
    _bundle_and_statistics(sens, "sens.json")
    sens.add_argument("--by", choices=("kind", "block", "layer"), default="kind", help="groups (default: kind)")
    sens.add_argument("--images", type=int, metavar="N", default=4, help="tiles to judge by (default: 4)")
    sens.add_argument("--images-dir", type=Path, metavar="DIR", help="where the observed images are, if they moved")

    recipe = verb(verbs, "recipe", "choose the layers in 8 bits, and their scales", _recipe)
    _bundle_and_statistics(recipe, "recipe.yaml")
    recipe.add_argument("--sens", type=Path, metavar="FILE", help="what calib sensitivity wrote")
    recipe.add_argument(
        "--budget-psnr", type=float, metavar="DB", help="keep layers in float until pictures are so close; needs --sens"
    )

    judge = verb(verbs, "gate", "judge engines in 8 bits on held-out images; exit 7 on a miss", _gate)
    judge.add_argument("bundle", type=Path, metavar="BUNDLE")
    judge.add_argument("images_dir", type=Path, metavar="IMAGES_DIR", help="images; those calibrated on are left out")
    judge.add_argument("--originals", type=Path, metavar="DIR", help="the pictures that they were made from, if known")
    judge.add_argument("--budget-psnr", type=float, metavar="DB", default=45.0, help="least likeness (default: 45)")
    judge.add_argument("--images", type=int, metavar="N", help="most images to take (default: all)")
    judge.add_argument("--steps", type=int, metavar="N", help="sampling steps, where the system has any")
    judge.add_argument("--threads", type=int, metavar="N", default=0, help="of an engine (default: all cores)")
    judge.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")
    expect_argument(judge)

    report = verb(verbs, "report", "show what was measured of a bundle's engines in 8 bits", _report)
    report.add_argument("bundle", type=Path, metavar="BUNDLE")
    report.add_argument("--html", type=Path, metavar="FILE", help="write a page with charts and pictures too")
    expect_argument(report)


def _bundle_and_statistics(parser: argparse.ArgumentParser, output: str) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("statistics", type=Path, metavar="STATISTICS", help="what calib collect wrote")
    parser.add_argument("--format", choices=("int8", "fp8"), required=True, help="the 8-bit format")
    parser.add_argument(
        "--method",
        choices=("absmax", "percentile", "mse", "entropy"),
        help="how ranges are chosen (default: mse for int8, absmax for fp8)",
    )
    parser.add_argument(
        "--smooth", type=float, metavar="S", help="move a part of large channels into the weights, from 0 to 1"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help=f"such as {output}")
    parser.add_argument("--threads", type=int, metavar="N", default=0, help="of an engine (default: all cores)")
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")
    expect_argument(parser)


def _collect(arguments: argparse.Namespace) -> None:
    from tilewright.calib import collect

    require_bundle(arguments.bundle)
    start, values = time.perf_counter(), own_values(arguments)
    options = ("images", "steps", "tile", "seed", "via", "memory", "threads", "weights_dir")
    with Progress(arguments) as progress:
        progress.doing("opening the engines")
        collected = collect(
            arguments.opened,
            arguments.images_dir,
            arguments.output,
            devices=arguments.devices.split(","),
            on_progress=progress.images,
            **{name: getattr(arguments, name) for name in options},
            **values,
        )
    seconds, peak, seen = time.perf_counter() - start, peak_bytes(), collected.observations
    tensors = {tensor: len(seen.steps(tensor)) for tensor in seen.tensors}
    names = [image["name"] for image in collected.facts["images"]]
    value = {
        "output": str(arguments.output),
        "images": names,
        "finished_before": collected.finished_before,
        "tensors": tensors,  # and at how many steps each was seen
        "seconds": seconds,
        "peak_bytes": peak,
    }
    text = f"{arguments.output}: {len(tensors)} tensors at up to {max(tensors.values(), default=0)} step(s)"
    text += f", {len(names)} images in {seconds:.1f} s"
    text += f", {collected.finished_before} of them before" if collected.finished_before else ""
    answer(arguments, value, f"{text}; peak {mebibytes(peak)}")


def _sensitivity(arguments: argparse.Namespace) -> None:
    from tilewright.calib import read_observations
    from tilewright.calib.judge.frontier import calibrated_pictures, frontier_rows, sensitivity
    from tilewright.runtime.bundle.read import read_bundle
    from tilewright.runtime.bundle.strict import encode

    start = time.perf_counter()
    with Progress(arguments, ("groups", "frontier")) as progress:
        bundle = read_bundle(arguments.bundle, expect=arguments.expect)
        observed, facts = read_observations(arguments.statistics)
        pictures = calibrated_pictures(bundle, facts, arguments.images_dir, arguments.images)
        options = {name: getattr(arguments, name) for name in ("method", "smooth", "by", "threads", "weights_dir")}
        found = sensitivity(
            bundle,
            observed,
            facts,
            pictures,
            arguments.output,
            arguments.format,
            **options,
            on_progress=progress.tiles,
        )
    groups = sorted(found.groups, key=lambda group: group.mean_db)
    rows = [[group.name, f"{group.share:.1%}", f"{group.mean_db:.1f}", f"{group.worst_db:.1f}"] for group in groups]
    text = table(["alone in 8 bits", "share of work", "dB", "worst"], rows)
    text += "\n\n" + table(list(FRONTIER), frontier_rows(found.frontier))
    text += f"\n{arguments.output}: {len(groups)} groups in {time.perf_counter() - start:.0f} s"
    answer(arguments, {"output": str(arguments.output)} | encode(found), text)


def _recipe(arguments: argparse.Namespace) -> None:
    from tilewright.calib import read_observations
    from tilewright.calib.judge.frontier import read_sensitivity, within_budget
    from tilewright.calib.recipe.make import make_recipe
    from tilewright.runtime.bundle.read import read_bundle
    from tilewright.runtime.errors import UsageError
    from tilewright.runtime.images.write import check_place

    if (arguments.sens is None) != (arguments.budget_psnr is None):
        raise UsageError("--budget-psnr and --sens belong together: calib sensitivity finds the layers that cost most")
    check_place(arguments.output)
    bundle = read_bundle(arguments.bundle, expect=arguments.expect)
    observed, facts = read_observations(arguments.statistics)
    found = None if arguments.sens is None else read_sensitivity(arguments.sens)
    options = {"method": arguments.method, "smooth": arguments.smooth}
    if found is not None:
        options = {name: getattr(found, name) if value is None else value for name, value in options.items()}
    recipe = make_recipe(bundle, observed, facts, arguments.format, weights_dir=arguments.weights_dir, **options)
    recipe = recipe if found is None else within_budget(recipe, found, arguments.budget_psnr)
    recipe.write(arguments.output)
    count, share = len(recipe.quantised), recipe.share("linear")
    value = {
        "output": str(arguments.output),
        "layers": len(recipe.layers),
        "quantised": count,
        "linear_share": share,
        "share": recipe.share(),
        "smoothed": sum(bool(entering.factors) for entering in recipe.inputs.values()),
    }
    text = f"{arguments.output}: {count} of {len(recipe.layers)} layers in {arguments.format}"
    text += f", {share:.1%} of the work of linear layers, {value['smoothed']} inputs smoothed"
    answer(arguments, value, text)


def _report(arguments: argparse.Namespace) -> None:
    from tilewright.calib.report.facts import report
    from tilewright.calib.report.page import page
    from tilewright.runtime.bundle.digests import writing
    from tilewright.runtime.images.write import check_place

    facts = report(arguments.bundle, expect=arguments.expect)
    text = report_text(facts)
    if arguments.html is not None:
        check_place(arguments.html)
        with writing(arguments.html) as temporary:
            temporary.write_text(page(facts, arguments.bundle), encoding="utf-8")
        text += f"\nwritten to {arguments.html}"
    answer(arguments, facts, text)


def _gate(arguments: argparse.Namespace) -> None:
    from tilewright.calib.judge.gates import CROPS, gate

    with Progress(arguments, ("memory", "pictures", "times")) as progress:
        report = gate(
            arguments.bundle,
            arguments.images_dir,
            budget_db=arguments.budget_psnr,
            most=arguments.images,
            crops=arguments.bundle / CROPS,
            on_progress=progress.tiles,
            **{name: getattr(arguments, name) for name in ("steps", "threads", "expect", "weights_dir", "originals")},
        )
    tell_gate(arguments, arguments.bundle, report)
