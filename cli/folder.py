"""Restoring the images of a folder: one bar, a summary, the failures."""

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from tilewright.cli.commands import as_typed
from tilewright.cli.main import ending
from tilewright.cli.terminal import Progress, answer, mebibytes, note
from tilewright.runtime.errors import TilewrightError, UsageError
from tilewright.runtime.folder import Outcome, images_of, restore_images
from tilewright.runtime.memory.machine import peak_bytes
from tilewright.runtime.profile import engines_text
from tilewright.runtime.restore import Restorer
from tilewright.runtime.resume.keeper import Kept

__all__ = ["restore_folder"]


def restore_folder(
    arguments: argparse.Namespace, open_restorer: Callable[[], Restorer], options: dict[str, Any]
) -> None:
    """Restore the images of a folder, and report each."""
    if str(arguments.output) == "-":
        raise UsageError(f"{arguments.input} is a folder; name a folder for the results, not standard output")
    pairs, others = images_of(arguments.input, arguments.output, arguments.format or "png")
    if others:
        note(arguments, f"{others} other file(s) of {arguments.input} are left out; their suffixes are of no image")
    start = time.perf_counter()
    with Progress(arguments) as progress:
        progress.doing("opening the engines")
        with open_restorer() as restorer:
            ran = restorer.ran
            progress.doing(f"reading {arguments.input}")
            outcomes = restore_images(
                restorer,
                pairs,
                force=arguments.force,
                resume=arguments.resume,
                keep_every_s=60 * arguments.checkpoint,
                on_progress=progress.images,
                **options,
            )
    seconds = time.perf_counter() - start
    rows = [_row(outcome, arguments.options) for outcome in outcomes]
    faults = [row["error"] for row in rows if "error" in row]
    peak = peak_bytes()
    value = {"images": rows, "failed": len(faults), "seconds": seconds, "peak_bytes": peak} | ran
    before = sum(outcome.finished for outcome in outcomes)
    good = f"{len(rows) - len(faults)} of {len(rows)} images in {seconds:.2f} s; peak {mebibytes(peak)}"
    good += f"; {before} were finished before" if before else ""
    lines = [f"{arguments.input} -> {arguments.output}: {good}", f"engines: {engines_text(**ran)}"]
    lines += [f"failed: {fault['message']}" for fault in faults]
    fault = None
    if faults:
        first = next(outcome.error for outcome in outcomes if outcome.error)
        kind = type(first) if isinstance(first, TilewrightError) else TilewrightError
        fault = kind(f"{len(faults)} of {len(rows)} images failed, the first is {faults[0]['message']}")
        fault.exit_code = faults[0]["code"]
        keeps = [getattr(outcome.error, "kept", None) for outcome in outcomes]
        if len(faults) < len(rows) or any(kept and kept.path for kept in keeps):
            fault.kept = Kept(arguments.output)
    answer(arguments, value, "\n".join(lines), fault=fault)


def _row(outcome: Outcome, options: Mapping[str, str]) -> dict[str, Any]:
    """An image in the JSON answer."""
    row: dict[str, Any] = {"input": str(outcome.source), "output": str(outcome.target)}
    if outcome.finished:
        return row | {"finished_before": True}
    if (error := outcome.error) is None:
        (row["input_width"], row["input_height"]), (row["width"], row["height"]) = outcome.input_size, outcome.size
        return row | {"tiles": outcome.tiles, "seconds": outcome.seconds}
    message, code = (str(error), error.exit_code) if isinstance(error, TilewrightError) else ending(error)
    message = as_typed(message, options)
    message = message if row["input"] in message else f"{row['input']}: {message}"
    return row | {"error": {"code": code, "kind": type(error).__name__, "message": message}}
