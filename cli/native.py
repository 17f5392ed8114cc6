"""`tilewright runtime restore --native`: the C++ library restores."""

import argparse
import sys
import time
from pathlib import Path
from typing import Any, BinaryIO

from tilewright.cli.engine_arguments import engine_options
from tilewright.cli.restore import put_image
from tilewright.cli.terminal import Progress, answer, mebibytes, note
from tilewright.runtime.bundle.arguments import flag
from tilewright.runtime.errors import UsageError
from tilewright.runtime.native import load_native
from tilewright.runtime.profile import engines_text

__all__ = ["restore_native"]

LACKS = {  # option that the library does not have -> its value when nobody gave it
    "cluster": None,
    "resume": False,
    "checkpoint": 15.0,
    "bits": 8,
}


def restore_native(
    arguments: argparse.Namespace, source: Path | BinaryIO, values: dict[str, Any], *, piped: bool
) -> None:
    """Restore one image with the C++ library."""
    for name, absent in LACKS.items():
        if getattr(arguments, name) != absent:
            raise UsageError(f"{flag(name)} does not work with --native; leave one of them out")
    start = time.perf_counter()
    with Progress(arguments) as progress:
        progress.doing("opening the engines")
        with load_native(arguments.opened, **engine_options(arguments)) as restorer:
            opened = time.perf_counter() - start
            names = ("tile", "overlap", "seed", "steps", "scale", "max_pixels", "color", "jitter")
            options = {name: getattr(arguments, name) for name in names}
            restoration = restorer.restore(source, on_progress=progress.tiles, **options, **values)
            library = restorer.ran["library"]
        before = time.perf_counter()
        put_image(arguments, restoration)
        now = time.perf_counter()
    for text in restoration.notes:
        note(arguments, text)
    height, width = restoration.image.shape[:2]
    value = {
        "input_width": width // restoration.scale,
        "input_height": height // restoration.scale,
        "output": str(arguments.output),
        "width": width,
        "height": height,
        "seconds": restoration.seconds | {"open": opened, "write": now - before, "total": now - start},
        "peak_bytes": restoration.peak_bytes,
        "engines": restoration.engines,
        "devices": restoration.devices,
        "notes": list(restoration.notes),
        "library": library,
    }
    text = (
        f"{arguments.input} {value['input_width']}x{value['input_height']} px -> {arguments.output} {width}x{height} px"
        f" in {now - start:.2f} s; peak {mebibytes(restoration.peak_bytes)}\n"
        f"engines: {engines_text(restoration.engines, restoration.devices)}; libtilewright {library}"
    )
    answer(arguments, value, text, to=sys.stderr if piped else None)
