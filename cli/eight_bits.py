"""Engines in 8 bits, for the verbs that build bundles and add engines to them: options, checks, and the work."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from tilewright.cli.terminal import Progress, answer
from tilewright.runtime.errors import UsageError

if TYPE_CHECKING:
    from tilewright.export.plans.build import Options

__all__ = ["add_calibrate", "add_eight_bits", "add_recipe", "eight_bit_inputs", "split_precisions"]


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the option that names a recipe."""
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="for --precision int8 or fp8: see calib recipe")


def add_calibrate(parser: argparse.ArgumentParser) -> None:
    """Add the options that make a recipe."""
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="IMAGES_DIR",
        help="for --precision int8 or fp8: find the recipe with these images",
    )
    parser.add_argument(
        "--budget-psnr", type=float, metavar="DB", default=45.0, help="least likeness with --calibrate (default: 45)"
    )


def split_precisions(arguments: argparse.Namespace) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The precisions in float, and the one in 8 bits if it is asked for. It needs a recipe, and only it takes one."""
    eight_bits = tuple(name for name in arguments.precision if name in ("int8", "fp8"))
    if len(eight_bits) > 1:
        raise UsageError("--precision int8,fp8: a recipe is of one 8-bit format; make one after the other")
    can_calibrate, calibrate = "calibrate" in arguments, getattr(arguments, "calibrate", None)
    if eight_bits and arguments.recipe is None and calibrate is None:
        more = " or --calibrate IMAGES_DIR" if can_calibrate else "; calib recipe makes one"
        raise UsageError(f"--precision {eight_bits[0]} needs --recipe FILE{more}")
    if not eight_bits and (arguments.recipe or calibrate):
        subject = "--recipe and --calibrate are" if can_calibrate else "--recipe is"
        raise UsageError(f"{subject} for --precision int8 or fp8; name one of them")
    return tuple(name for name in arguments.precision if name not in eight_bits), eight_bits


def eight_bit_inputs(arguments: argparse.Namespace, precision: str, targets: Sequence[str]) -> str:
    """The digest of all that the engines in 8 bits depend on besides the bundle."""
    from tilewright.calib.inputs import inputs_of
    from tilewright.calib.recipe import read_recipe

    if arguments.recipe is not None:
        return inputs_of(precision, targets, recipe=read_recipe(arguments.recipe))
    return inputs_of(precision, targets, folder=arguments.calibrate, budget_db=arguments.budget_psnr)


def add_eight_bits(
    arguments: argparse.Namespace,
    root: Path,
    precision: str,
    targets: Sequence[str],
    plans: "Options | None" = None,
) -> None:
    """Add engines in 8 bits to a bundle, by a recipe or by pictures."""
    from tilewright.calib.engines import add_engines
    from tilewright.calib.one_step import calibrate
    from tilewright.calib.recipe import read_recipe
    from tilewright.cli.judged import tell_gate

    if arguments.recipe is not None:
        recipe = read_recipe(arguments.recipe)
        if recipe.format != precision:
            raise UsageError(f"{arguments.recipe} is a recipe for {recipe.format}, not {precision}")
        with Progress(arguments) as progress:
            added = add_engines(
                root,
                recipe,
                targets,
                expect=getattr(arguments, "expect", None),
                plans=plans,
                on_progress=progress.tiles,
            )
        lines = [f"{root}: has {', '.join(added.engines)}, digest {added.digest[:12]}"]
        lines += [f"{engine}: {form}" for engine, form in added.forms.items()]
        lines += [f"next: tilewright calib gate {shlex.quote(str(root))} IMAGES_DIR, which judges all engines"]
        answer(arguments, asdict(added), "\n".join(lines))
        return
    with Progress(
        arguments, ("observing", "groups", "frontier", "choosing forms", "memory", "pictures", "times")
    ) as progress:
        done = calibrate(
            root,
            arguments.calibrate,
            precision,
            budget_db=arguments.budget_psnr,
            targets=tuple(targets),
            on_progress=progress.tiles,
        )
    layers = f"{len(done.recipe.quantised)} of {len(done.recipe.layers)} layers in {precision}"
    tell_gate(arguments, root, done.report, f"{root}: has {', '.join(done.added.engines)}, {layers}\n")
