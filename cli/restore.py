"""The verb `tilewright runtime restore`."""

import argparse
import contextlib
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tilewright.cli.bundle_arguments import LISTED, bundle_arguments, own_arguments, own_values
from tilewright.cli.engine_arguments import engine_arguments, note_large_tile, open_restorer
from tilewright.cli.terminal import Progress, answer, mebibytes, note, send_image
from tilewright.runtime.errors import UsageError
from tilewright.runtime.images.color import COLORS
from tilewright.runtime.images.write import (
    FORMATS,
    OnShare,
    check_format,
    check_overwrite,
    check_room,
    check_writable,
    encode_image,
    write_or_keep,
)
from tilewright.runtime.profile import engines_text
from tilewright.runtime.resume.checkpoint import beside, share_in
from tilewright.runtime.sitting import Restoration

__all__ = ["minutes", "put_image", "restore", "restore_arguments"]

STREAM = "-"
LONGEST = 1_000_000  # minutes


def restore_arguments(restore: argparse.ArgumentParser) -> None:
    """Add what a restoration takes."""
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
        type=minutes,
        metavar="MINUTES",
        default=15.0,
        help="keep finished parts this often, not only when stopped; 0 is never (default: 15)",
    )
    bundle_arguments(restore)
    engine_arguments(restore)
    restore.add_argument("--seed", type=int, metavar="N", default=0, help="of the noise (default: 0)")
    restore.add_argument("--steps", type=int, metavar="N", help="sampling steps, where the system has any")
    restore.add_argument("--scale", type=int, metavar="N", help="enlarge by this, where the system leaves it open")
    restore.add_argument(
        "--bits", type=int, choices=(8, 16), default=8, help="of a channel; 16 keeps those of the input (default: 8)"
    )
    restore.add_argument(
        "--color",
        choices=COLORS,
        default="off",
        help="take the input's low frequencies (wavelet), or its mean and spread (adain) (default: off)",
    )
    restore.add_argument(
        "--jitter", action="store_true", help="move the borders of tiles from step to step, where steps join tiles"
    )
    restore.add_argument(
        "--native", action="store_true", help="with the C++ library, which make cpp builds or TILEWRIGHT_LIBRARY names"
    )
    restore.add_argument(
        "--max-pixels", type=int, metavar="N", default=100_000_000, help="refuse larger inputs (default: 100 million)"
    )
    restore.epilog = LISTED
    restore.set_defaults(more_arguments=own_arguments)


def minutes(word: str) -> float:
    """The value of --checkpoint."""
    try:
        number = float(word)
    except ValueError:
        number = -1.0
    if not 0 <= number <= LONGEST:
        raise UsageError(f"--checkpoint {word!r} is not a number of minutes from 0 to {LONGEST}")
    return number


def restore(arguments: argparse.Namespace) -> None:
    """Restore an image or a folder."""
    if str(arguments.input) != STREAM and arguments.input.is_dir():
        values = own_values(arguments)
        _notes(arguments)
        _lift_pillows_limit()
        if arguments.native:
            raise UsageError(f"--native restores one image, and {arguments.input} is a folder; leave it out")
        from tilewright.cli.folder import restore_folder

        restore_folder(arguments, partial(open_restorer, arguments), _sizes(arguments) | values)
        return
    source, piped = _streams(arguments)
    values = own_values(arguments)
    _notes(arguments)
    _lift_pillows_limit()
    if arguments.native:
        from tilewright.cli.native import restore_native

        restore_native(arguments, source, values, piped=piped)
        return
    file = None if piped else beside(arguments.output)
    _note_resume(arguments, file)
    start = time.perf_counter()
    with Progress(arguments) as progress:
        progress.doing("opening the engines")
        with open_restorer(arguments) as restorer:
            opened = time.perf_counter() - start
            progress.doing("reading the image")
            options = _sizes(arguments) | values | {"resume": file if arguments.resume else None}
            options["beside"] = None if piped else arguments.output
            sitting = restorer.sitting(source, on_progress=progress.tiles, **options)
            if piped:
                check_format("the image", f".{arguments.format or 'png'}", sitting.shape)
            elif sitting.beside is None:
                check_room(arguments.output, sitting.shape)
            elif not arguments.quiet:
                progress.say("note: the pixels of the picture lie on the disk, beside the output")
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
                put_image(arguments, restoration, on_share=on_share)
                now = time.perf_counter()
                seams = ticket.seam_excess() if arguments.json else None  # it takes seconds for large pictures
    seconds = restoration.seconds | {"open": opened, "write": now - before, "total": now - start}
    height, width = restoration.image.shape[:2]
    value = {
        "input_width": width // restoration.scale,
        "input_height": height // restoration.scale,
        "output": str(arguments.output),
        "width": width,
        "height": height,
        "bits": arguments.bits,
        "on_disk": sitting.beside is not None,
        "tiles": restoration.tiles,
        "seam_excess": seams,
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


def put_image(arguments: argparse.Namespace, restoration: Restoration, *, on_share: OnShare | None = None) -> None:
    """Write a result to the command's output, which is a file or standard output."""
    image, icc, exif = restoration.image, restoration.icc, restoration.exif
    if str(arguments.output) == STREAM:
        send_image(encode_image(image, arguments.format or "png", icc=icc, exif=exif, on_share=on_share))
    else:
        write_or_keep(arguments.output, image, icc=icc, exif=exif, on_share=on_share)


def _lift_pillows_limit() -> None:
    """Let `--max-pixels` decide alone. A command may do that, because its process runs nothing else."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None


def _sizes(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of a restoration that are not the bundle's."""
    names = ("tile", "overlap", "seed", "steps", "scale", "max_pixels", "bits", "color", "jitter")
    return {name: getattr(arguments, name) for name in names}


def _notes(arguments: argparse.Namespace) -> None:
    """Notes on a restoration that may not be what the user expects."""
    weights = arguments.opened.manifest.options.get("weights", "")
    if weights.startswith(("random", "stand-in")):
        kind = weights.partition(",")[0]
        note(arguments, f"this bundle holds {kind} weights; the picture proves plumbing, not restoration")
    note_large_tile(arguments, arguments.opened.program)


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
