"""The arguments of a command that opens engines."""

import argparse
from pathlib import Path
from typing import Any

from tilewright.cli.terminal import note
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.memory.estimate import MEMORY_MODES
from tilewright.runtime.restore import Restorer, load

__all__ = [
    "engine_argument",
    "engine_arguments",
    "engine_options",
    "load_arguments",
    "note_large_tile",
    "open_restorer",
]


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a command that opens engines."""
    load_arguments(parser)
    parser.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")
    parser.add_argument(
        "--cluster",
        metavar="ADDRESS",
        help="use these devices of every machine of a Ray cluster: auto, HOST:PORT or ray://HOST:PORT",
    )


def load_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that decide how much memory the engines need."""
    parser.add_argument(
        "--memory", choices=MEMORY_MODES, default="fast", help="speed, or weights mapped and not copied"
    )
    engine_argument(parser)
    parser.add_argument(
        "--memory-limit", metavar="SIZE", help="refuse what may need more, as 2GiB or 800MB (default: what is free)"
    )
    parser.add_argument("--threads", type=int, metavar="N", default=0, help="of an engine (default: all cores)")
    parser.add_argument(
        "--devices", default="cpu:0", metavar="NAMES", help="run tiles at once on cpu:0,cpu:1,... (default: cpu:0)"
    )
    parser.add_argument("--batch", type=int, metavar="N", help="most tiles in a call, instead of the bundle's")


def engine_argument(parser: argparse.ArgumentParser) -> None:
    """Add --engine."""
    parser.add_argument(
        "--engine", metavar="WISH", help="a name, precision or backend of engines (default: the best that runs here)"
    )


def open_restorer(arguments: argparse.Namespace) -> Restorer:
    """A restorer with the engines that the command asks for."""
    return load(arguments.opened, cluster=arguments.cluster, tile=arguments.tile, **engine_options(arguments))


def engine_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options that `load` and `load_native` share."""
    names = ("engine", "memory", "threads", "batch", "weights_dir", "memory_limit")
    return {name: getattr(arguments, name) for name in names} | {"devices": arguments.devices.split(",")}


def note_large_tile(arguments: argparse.Namespace, program: Program) -> None:
    """Say that a tile is larger than those of the bundle."""
    tiles = [p.tiles for p in program.passes if p.tiles and not p.tiles.fixed_px]
    least = min((max(t.px, *(t.whole_up_to_px or (0,))) for t in tiles), default=None)
    if least is not None and arguments.tile is not None and arguments.tile > least:
        note(
            arguments,
            f"--tile {arguments.tile} is larger than the {least} px this bundle is made for; it may take much longer"
            " and draw a pattern over the picture",
        )
