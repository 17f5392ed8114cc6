"""The verbs of `tilewright calib`: collect."""

import argparse
import time
from pathlib import Path
from typing import Any

from tilewright.cli.bundle_arguments import own_arguments, own_values
from tilewright.cli.terminal import Progress, answer, expect_argument, mebibytes, verb
from tilewright.runtime.bundle.read import require_bundle
from tilewright.runtime.estimate import MEMORY_MODES, peak_bytes

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verb collect."""
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
