"""The verb `tilewright runtime profile`: an atlas of sizes and settings, and what changed since another one."""

import argparse
import json
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from tilewright.cli.bundle_arguments import LISTED, bundle_arguments, own_arguments, own_values
from tilewright.cli.engine_arguments import note_large_tile
from tilewright.cli.terminal import Progress, answer
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.errors import EnvironmentMismatch, InputError, ResourceError, UsageError
from tilewright.runtime.images.write import check_place
from tilewright.runtime.memory.estimate import MEMORY_MODES

__all__ = ["profile", "profile_arguments"]

DIFF = "diff"


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a profile takes: several batches, sets of devices and engines."""
    parser.add_argument(
        "words", nargs="*", metavar="diff OLD NEW", help="compare two files that --json FILE wrote; measure nothing"
    )
    bundle_arguments(parser, required=False)
    parser.add_argument(
        "--resolutions",
        metavar="SIZES",
        default="512,1024",
        help="output sizes: 512 or 2560x1440, with commas (default: 512,1024)",
    )
    parser.add_argument("--interpolate", metavar="SIZES", help="also estimate these sizes, which are not measured")
    parser.add_argument("--batch", metavar="N,...", help="most tiles in a call; each number is measured by itself")
    parser.add_argument(
        "--devices", action="append", metavar="NAMES", help="as for restore; each --devices is measured by itself"
    )
    parser.add_argument(
        "--engine", action="append", metavar="WISH", help="as for restore; each --engine is measured by itself"
    )
    parser.add_argument("--eager", action="store_true", help="also measure the networks in eager PyTorch")
    parser.add_argument(
        "--runs", type=int, metavar="N", default=5, help="measured runs after a warm-up, at least 5 (default: 5)"
    )
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with plots")
    parser.add_argument("--memory", choices=MEMORY_MODES, default="fast", help="as for restore")
    parser.add_argument("--memory-limit", metavar="SIZE", help="as for restore")
    parser.add_argument("--threads", type=int, metavar="N", default=0, help="as for restore")
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")
    parser.add_argument("--steps", type=int, metavar="N", help="as for restore")
    parser.epilog = LISTED
    parser.set_defaults(more_arguments=own_arguments)


def profile(arguments: argparse.Namespace) -> None:
    """Measure, or compare two measurements."""
    from tilewright.runtime.atlas import atlas, atlas_table, diff, diff_table
    from tilewright.runtime.atlas_page import page
    from tilewright.runtime.profile import resolutions

    if arguments.words:
        if arguments.words[0] != DIFF or len(arguments.words) != 3:
            raise UsageError(f"profile {' '.join(arguments.words)!r}: write profile diff OLD.json NEW.json")
        changes = diff(*(_read(Path(name)) for name in arguments.words[1:]))
        _tell(arguments, changes, diff_table(changes))
        return
    if arguments.bundle is None:
        raise UsageError("profile needs --bundle DIR, or: profile diff OLD.json NEW.json")
    for file in (arguments.html, arguments.json):
        if file and file is not True:
            check_place(file)
    sizes = resolutions(arguments.resolutions)
    between = resolutions(arguments.interpolate) if arguments.interpolate else []
    document = atlas(_measured(arguments, sizes, between))
    if arguments.html:
        _write(arguments.html, page(document))
    _tell(arguments, document, atlas_table(document))


def _measured(
    arguments: argparse.Namespace, sizes: list[tuple[int, int]], between: list[tuple[int, int]]
) -> list[dict[str, Any]]:
    """A profile for each setting."""
    from tilewright.runtime.atlas import interpolated
    from tilewright.runtime.profile import profile as measure
    from tilewright.runtime.restore import load

    values = own_values(arguments)
    if arguments.eager and (find_spec("torch") is None or find_spec("tilewright.export") is None):
        raise EnvironmentMismatch("--eager needs PyTorch and the builder: pip install 'tilewright[export]'")
    note_large_tile(arguments, arguments.opened.program)
    engines = [(name, False) for name in arguments.engine or [None]] + [(None, True)] * arguments.eager
    settings = list(product(engines, arguments.devices or ["cpu:0"], _batches(arguments.batch)))
    parts = [f"{width}x{height}" for _ in settings for width, height in sizes]
    profiles = []
    with Progress(arguments, parts) as progress:
        for (engine, eager), devices, batch in settings:
            options = {"memory": arguments.memory, "threads": arguments.threads, "tile": arguments.tile, "batch": batch}
            options |= {"weights_dir": arguments.weights_dir, "memory_limit": arguments.memory_limit}
            with load(arguments.opened, engine=engine, devices=devices.split(","), **options) as restorer:
                if eager:
                    _use_eager(restorer, arguments.weights_dir)
                shared = {"tile": arguments.tile, "overlap": arguments.overlap}
                measured = measure(
                    restorer,
                    sizes,
                    runs=arguments.runs,
                    steps=arguments.steps,
                    on_progress=progress.tiles,
                    **shared,
                    **values,
                )
                if eager:
                    from importlib.metadata import version

                    measured["engines"] = dict.fromkeys(measured["engines"], "eager PyTorch")
                    measured["engine"] = f"torch {version('torch')}"
                guesses = []
                for width, height in between:
                    scale = restorer.bundle.program.scale
                    plans = restorer.estimate(-(-width // scale), -(-height // scale), **shared).passes
                    computed = sum(plan.count * plan.tile_height * plan.tile_width for _, plan in plans)
                    seconds = interpolated(measured["resolutions"], computed)
                    guesses.append({"width": width, "height": height, "seconds": seconds})
                profiles.append(measured | ({"interpolated": guesses} if between else {}))
    return profiles


def _use_eager(restorer: Any, weights_dir: Path | None) -> None:
    """Put eager networks in the place of engines, on every device."""
    from tilewright.export.verify.eager import eager_network

    names = sorted(restorer.specs)
    networks = {name: eager_network(restorer.bundle, name, weights_dir) for name in names}
    for device in restorer.executor.devices:
        device.close()
        device.engines.opened.update(networks)


def _batches(text: str | None) -> list[int | None]:
    if text is None:
        return [None]
    if not all(word.strip().isdecimal() and int(word) for word in text.split(",")):
        raise UsageError(f"--batch {text!r} is no list of numbers; write 1 or 1,2,4")
    return [int(word) for word in text.split(",")]


def _read(path: Path) -> dict[str, Any]:
    """An atlas from a file."""
    try:
        document = json.loads(path.read_bytes())
        rows = [row for setting in document["settings"] for row in setting["resolutions"]]
        if all({"runs_s", "seconds", "peak_bytes", "tiles"} <= row.keys() for row in rows):
            return dict(document)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise InputError(f"{path} is no profile: name a file that profile --json FILE wrote")


def _tell(arguments: argparse.Namespace, value: Any, text: str) -> None:
    """Print the answer, or write it as JSON to the file that --json names and print it as text."""
    if isinstance(arguments.json, str):
        _write(Path(arguments.json), json.dumps(value, indent=2, sort_keys=True) + "\n")
        arguments.json = False
    answer(arguments, value, text)


def _write(path: Path, text: str) -> None:
    try:
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResourceError(f"{path} cannot be written ({error.strerror}): choose another place") from error
