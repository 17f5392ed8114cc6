"""The verbs of `tilewright runtime`: restore, plan, simulate, select, doctor, profile."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tilewright.cli.simulate import simulate, simulate_arguments
from tilewright.cli.terminal import Progress, answer, expect_argument, mebibytes, note, send_image, verb
from tilewright.runtime.bundle.arguments import Argument, flag
from tilewright.runtime.bundle.program import Input, Program
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import UsageError
from tilewright.runtime.estimate import MEMORY_MODES, bytes_of, estimate
from tilewright.runtime.images.write import (
    FORMATS,
    check_format,
    check_overwrite,
    check_room,
    check_writable,
    encode_image,
    write_or_keep,
)
from tilewright.runtime.inputs import checked
from tilewright.runtime.profile import engines_text
from tilewright.runtime.restore import Restorer, load
from tilewright.runtime.resume.checkpoint import beside, share_in
from tilewright.runtime.setup import set_up

__all__ = ["add_verbs"]


LISTED = "A bundle has arguments of its own: --bundle DIR --help lists them."
STREAM = "-"
LONGEST = 1_000_000  # minutes
METAVARS = {"words": "WORDS", "tensors": "FILE", "number": "NUMBER", "integer": "INTEGER"}


def add_verbs(verbs: Any) -> None:
    """Add the verbs restore, plan, simulate, select, doctor and profile."""
    _restore_arguments(verb(verbs, "restore", "restore an image, or every image of a folder", _restore))

    plan = verb(verbs, "plan", "tiles and memory for an image size; nothing is run", _plan)
    plan.add_argument("width", type=int, help="of the input image")
    plan.add_argument("height", type=int)
    _bundle_arguments(plan)
    _load_arguments(plan)
    plan.add_argument("--scale", type=int, metavar="N", help="as for restore")

    _bundle_arguments(simulate_arguments(verb(verbs, "simulate", "time on several devices; nothing is run", simulate)))

    select = verb(verbs, "select", "the best of several restorations of one image, by scores of quality", _select)
    select.add_argument("candidates", nargs="+", type=Path, metavar="IMAGE", help="in the order of their rounds")
    select.add_argument("--scores", type=Path, required=True, metavar="CSV", help="image,METRIC,...; higher is better")

    doctor = verb(verbs, "doctor", "the devices here, and the engines that would run on them", _doctor)
    doctor.add_argument("bundle", nargs="?", type=Path, metavar="BUNDLE", help="its directory (default: no engines)")
    _engine_argument(doctor)
    expect_argument(doctor)

    _profile_arguments(verb(verbs, "profile", "measure latency and memory per resolution", _profile))


def _restore_arguments(restore: argparse.ArgumentParser) -> None:
    restore.add_argument("input", type=Path, metavar="IN", help="an image, a folder, or - for standard input")
    restore.add_argument(
        "output", type=Path, metavar="OUT", help="its suffix chooses the format; a folder; or - for standard output"
    )
    restore.add_argument(
        "--format", choices=FORMATS, help="of the images in a folder, or on standard output (default: png)"
    )
    restore.add_argument("--force", action="store_true", help="replace the input itself, or a read-only file")
    restore.add_argument(
        "--resume", action="store_true", help="go on from what a command was stopped at; without that, begin anew"
    )
    restore.add_argument(
        "--checkpoint",
        type=_minutes,
        metavar="MINUTES",
        default=15.0,
        help="keep finished parts this often, not only when stopped; 0 is never (default: 15)",
    )
    _bundle_arguments(restore)
    _engine_arguments(restore)
    restore.add_argument("--seed", type=int, metavar="N", default=0, help="of the noise (default: 0)")
    restore.add_argument("--steps", type=int, metavar="N", help="sampling steps, where the system has any")
    restore.add_argument("--scale", type=int, metavar="N", help="enlarge by this, where the system leaves it open")
    restore.add_argument(
        "--max-pixels", type=int, metavar="N", default=100_000_000, help="refuse larger inputs (default: 100 million)"
    )
    restore.epilog = LISTED
    restore.set_defaults(more_arguments=_arguments_of_bundle)


def _minutes(word: str) -> float:
    try:
        minutes = float(word)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes <= LONGEST:
        raise UsageError(f"--checkpoint {word!r} is not a number of minutes from 0 to {LONGEST}")
    return minutes


def _profile_arguments(profile: argparse.ArgumentParser) -> None:
    _bundle_arguments(profile)
    _engine_arguments(profile)
    profile.add_argument(
        "--resolutions",
        metavar="SIZES",
        default="512,1024",
        help="output sizes: 512 or 2560x1440, with commas (default: 512,1024)",
    )
    profile.add_argument(
        "--runs", type=int, metavar="N", default=5, help="measured runs after a warm-up, at least 5 (default: 5)"
    )
    profile.add_argument("--steps", type=int, metavar="N", help="as for restore")
    profile.epilog = LISTED
    profile.set_defaults(more_arguments=_arguments_of_bundle)


class _Once(argparse.Action):
    """An argument of the bundle, which may be given once."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if hasattr(namespace, self.dest):
            raise UsageError(f"{option_string} is given twice; give it once")
        setattr(namespace, self.dest, values)


def _arguments_of_bundle(parser: argparse.ArgumentParser, words: Sequence[str]) -> None:
    """Read the bundle that the command names, and add its arguments to the parser."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--bundle", nargs="?")
    reader.add_argument("--expect", nargs="?")
    named = reader.parse_known_args([*words])[0]
    if named.bundle is None:
        return
    bundle = read_bundle(named.bundle, expect=named.expect)
    system = bundle.manifest.system
    group = parser.add_argument_group(f"arguments of this bundle ({system})", None if bundle.arguments else "none")
    for name, argument in bundle.arguments.items():
        group.add_argument(
            flag(name),
            action=_Once,
            dest=f"${name}",  # so that it cannot be one of ours
            type=_converter(name, bundle.program.inputs.get(name)),
            metavar=METAVARS.get(argument.kind) or f"{{{','.join(argument.choices)}}}",
            default=argparse.SUPPRESS,
            help=_help(argument).replace("%", "%%"),
        )
    flags = ", ".join(map(flag, bundle.arguments)) or "no arguments of its own"
    parser.set_defaults(opened=bundle, takes=f"this bundle takes {flags}")
    parser.epilog = None


def _converter(name: str, spec: Input | None) -> Callable[[str], Any]:
    """A function that converts a word of the command line into a value; texts and files stay as they are."""

    def convert(word: str) -> Any:
        if spec is None:
            return word
        value: Any = word
        if not spec.choices:
            with contextlib.suppress(ValueError):
                value = float(word) if "float" in spec.dtype else int(word)
        checked(flag(name), f"{flag(name)} {word!r}", spec, value)
        return value

    return convert


def _help(argument: Argument) -> str:
    ranged = "" if argument.least is argument.most is None else f"; {argument.takes}"
    return f"{argument.help}{ranged} ({argument.otherwise})"


def _bundle_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """The values of the bundle's arguments."""
    values = {name[1:]: value for name, value in vars(arguments).items() if name.startswith("$")}
    listed = arguments.opened.arguments
    from_file = any(listed[name].kind == "tensors" for name in values)
    for name, argument in listed.items():
        if argument.needed and name not in values and not from_file:
            raise UsageError(f"{flag(name)} has no default; give it: {argument.help or argument.takes}")
    return values


def _bundle_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR")
    expect_argument(parser)
    parser.add_argument(
        "--tile", type=int, metavar="PX", help="side of a tile in output pixels, instead of the bundle's"
    )
    parser.add_argument(
        "--overlap", type=int, metavar="PX", help="pixels that two neighbouring tiles share, instead of the bundle's"
    )


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    _load_arguments(parser)
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")


def _load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, default="fast", help="speed, or weights mapped and not copied"
    )
    _engine_argument(parser)
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="refuse what may need more, as 2GiB or 800MB (default: what is free)"
    )
    parser.add_argument("--threads", type=int, metavar="N", default=0, help="of an engine (default: all cores)")
    parser.add_argument(
        "--devices", default="cpu:0", metavar="NAMES", help="run tiles at once on cpu:0,cpu:1,... (default: cpu:0)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="most tiles in a call, instead of the bundle's")


def _engine_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine", metavar="WISH", help="a name, precision or backend of engines (default: the best that runs here)"
    )


def _open(arguments: argparse.Namespace) -> Restorer:
    return load(
        arguments.opened,
        engine=arguments.engine,
        memory=arguments.memory,
        threads=arguments.threads,
        devices=arguments.devices.split(","),
        batch=arguments.batch,
        tile=arguments.tile,
        weights_dir=arguments.weights_dir,
        memory_limit=arguments.memory_limit,
    )


def _restore(arguments: argparse.Namespace) -> None:
    if str(arguments.input) != STREAM and arguments.input.is_dir():
        values = _bundle_values(arguments)
        _notes(arguments)
        _lift_pillows_limit()
        from tilewright.cli.folder import restore_folder

        restore_folder(arguments, partial(_open, arguments), _sizes(arguments) | values)
        return
    source, piped = _streams(arguments)
    values = _bundle_values(arguments)
    _notes(arguments)
    _lift_pillows_limit()
    file = None if piped else beside(arguments.output)
    _note_resume(arguments, file)
    start = time.perf_counter()
    with Progress(arguments) as progress:
        progress.doing("opening the engines")
        with _open(arguments) as restorer:
            opened = time.perf_counter() - start
            progress.doing("reading the image")
            options = _sizes(arguments) | values | {"resume": file if arguments.resume else None}
            sitting = restorer.sitting(source, on_progress=progress.tiles, **options)
            if piped:
                check_format("the image", f".{arguments.format or 'png'}", sitting.shape)
            else:
                check_room(arguments.output, sitting.shape)
            ticket = sitting.begin({}, keep=False)
            progress.follow(ticket.forecast)
            if ticket.resumed and not arguments.quiet:
                progress.say(f"note: goes on from {file}: {ticket.resumed[1]:.0%} was done")
            with contextlib.ExitStack() as stack:
                if file:
                    stopping = partial(progress.doing, "keeping what is finished")
                    stack.enter_context(ticket.keeping(file, every_s=60 * arguments.checkpoint, on_stop=stopping))
                restoration = ticket.result()
                restorer.close()  # the engines' memory is free while the image is written
                writing = "writing the image" if piped else f"writing {arguments.output}"
                progress.doing(writing)
                on_share = partial(progress.share, writing)
                before = time.perf_counter()
                if piped:
                    send_image(
                        encode_image(
                            restoration.image, arguments.format or "png", icc=restoration.icc, on_share=on_share
                        )
                    )
                else:
                    write_or_keep(arguments.output, restoration.image, icc=restoration.icc, on_share=on_share)
                now = time.perf_counter()
    seconds = restoration.seconds | {"open": opened, "write": now - before, "total": now - start}
    height, width = restoration.image.shape[:2]
    value = {
        "input_width": width // restoration.scale,
        "input_height": height // restoration.scale,
        "output": str(arguments.output),
        "width": width,
        "height": height,
        "tiles": restoration.tiles,
        "seconds": seconds,
        "peak_bytes": restoration.peak_bytes,
        "engines": restoration.engines,
        "devices": restoration.devices,
        "notes": list(restoration.notes),
        "resumed": ticket.resumed[1] if ticket.resumed else 0.0,
    }
    for text in restoration.notes:
        note(arguments, text)
    answer(arguments, value, _restored(arguments.input, value), to=sys.stderr if piped else None)


def _lift_pillows_limit() -> None:
    """Let `--max-pixels` decide alone. A command may do that, because its process runs nothing else."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a restoration that are not the bundle's."""
    return {name: getattr(arguments, name) for name in ("tile", "overlap", "seed", "steps", "scale", "max_pixels")}


def _notes(arguments: argparse.Namespace) -> None:
    """Notes on a restoration that may not be what the user expects."""
    weights = arguments.opened.manifest.options.get("weights", "")
    if weights.startswith(("random", "stand-in")):
        kind = weights.partition(",")[0]
        note(arguments, f"this bundle holds {kind} weights; the picture proves plumbing, not restoration")
    _note_large_tile(arguments, arguments.opened.program)


def _note_resume(arguments: argparse.Namespace, file: Path | None) -> None:
    """Notes on the finished parts of an earlier command."""
    if file is None:
        if arguments.resume:
            raise UsageError("--resume needs a file as the output; name one instead of -")
        return
    if arguments.resume and not file.exists():
        note(arguments, f"there is no {file}, so this begins anew")
    elif not arguments.resume and (share := share_in(file)) is not None:
        note(arguments, f"{file} holds {share:.0%} of an earlier restoration; to go on from there, add --resume")


def _note_large_tile(arguments: argparse.Namespace, program: Program) -> None:
    tiles = [p.tiles for p in program.passes if p.tiles and not p.tiles.fixed_px]
    least = min((max(t.px, *(t.whole_up_to_px or (0,))) for t in tiles), default=None)
    if least is not None and arguments.tile is not None and arguments.tile > least:
        note(
            arguments,
            f"--tile {arguments.tile} is larger than the {least} px this bundle is made for; it may take much longer"
            " and draw a pattern over the picture",
        )


def _streams(arguments: argparse.Namespace) -> tuple[Path | BinaryIO, bool]:
    """The source of the image, and whether the result goes to standard output. Bad ones are refused before any work."""
    piped = str(arguments.output) == STREAM
    if piped:
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError("standard output is no place for an image here; name a file, or write > FILE after it")
    else:
        if arguments.format:
            raise UsageError(
                f"--format is for standard output and folders; the suffix of {arguments.output} chooses its format"
            )
        check_writable(arguments.output)
        if not arguments.force:
            check_overwrite(arguments.output, arguments.input)
    if str(arguments.input) != STREAM:
        return arguments.input, piped
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("standard input holds no image here; name a file, or write < FILE after it")
    return sys.stdin.buffer, piped


def _restored(source: Path, value: dict[str, Any]) -> str:
    width, height, seconds = value["width"], value["height"], value["seconds"]
    tiles = ", ".join(f"{name} {count}" for name, count in value["tiles"].items())
    phases = ", ".join(f"{name} {spent:.2f}" for name, spent in seconds.items() if name != "total")
    peak = mebibytes(value["peak_bytes"])
    return (
        f"{source} {value['input_width']}x{value['input_height']} px -> {value['output']} {width}x{height} px"
        f" in {seconds['total']:.2f} s; tiles: {tiles}; peak {peak}\n"
        f"engines: {engines_text(value['engines'], value['devices'])}; seconds: {phases}"
    )


def _plan(arguments: argparse.Namespace) -> None:
    bundle = read_bundle(arguments.bundle, expect=arguments.expect)
    _note_large_tile(arguments, bundle.program)
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


def _profile(arguments: argparse.Namespace) -> None:
    from tilewright.runtime.profile import profile, resolutions, table

    sizes, values = resolutions(arguments.resolutions), _bundle_values(arguments)
    _note_large_tile(arguments, arguments.opened.program)
    parts = [f"{width}x{height}" for width, height in sizes]
    with _open(arguments) as restorer, Progress(arguments, parts) as progress:
        measured = profile(
            restorer,
            sizes,
            runs=arguments.runs,
            tile=arguments.tile,
            overlap=arguments.overlap,
            steps=arguments.steps,
            on_progress=progress.tiles,
            **values,
        )
    answer(arguments, measured, table(measured))
