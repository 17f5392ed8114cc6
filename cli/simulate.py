"""The verb `tilewright runtime simulate`: a job on a number of devices, on a virtual clock."""

import argparse
import math
from pathlib import Path

from tilewright.cli.terminal import answer
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import UsageError, amount
from tilewright.runtime.inputs import whole

__all__ = ["simulate", "simulate_arguments"]

MOST = 100_000  # devices, or images at once


def simulate_arguments(simulate: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add what a simulation takes beside a bundle and its tiles."""
    simulate.add_argument("size", metavar="SIZE", help="of the result: 12288x6912")
    simulate.add_argument("--devices", type=int, metavar="N", default=1, help="how many (default: 1)")
    simulate.add_argument("--step-ms", type=float, metavar="MS", required=True, help="of one run of a pass's engines")
    simulate.add_argument("--join-ms", type=float, metavar="MS", default=0.0, help="to gather its tiles (default: 0)")
    simulate.add_argument("--images", type=int, metavar="N", default=1, help="of this size at once (default: 1)")
    simulate.add_argument("--steps", type=int, metavar="N", help="as for restore")
    simulate.add_argument("--svg", type=Path, metavar="FILE", help="draw the timeline")
    return simulate


def simulate(arguments: argparse.Namespace) -> None:
    """Simulate a job and print its times."""
    from tilewright.runtime.simulate import Cost, graph_of, svg, timeline
    from tilewright.runtime.simulate import simulate as simulated

    sides = arguments.size.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise UsageError(f"{arguments.size!r} is no size; write WIDTHxHEIGHT, such as 12288x6912")
    for name in ("devices", "images"):
        whole(name, getattr(arguments, name), 1, MOST)
    if not (0 < arguments.step_ms < math.inf and 0 <= arguments.join_ms < math.inf):
        raise UsageError(f"--step-ms {arguments.step_ms:g}, --join-ms {arguments.join_ms:g}: times must be positive")
    bundle = read_bundle(arguments.bundle, expect=arguments.expect)
    width, height = map(int, sides)
    options = {name: getattr(arguments, name) for name in ("tile", "overlap", "steps", "images")}
    graph = graph_of(bundle.program, width, height, **options)
    cost = Cost(arguments.step_ms / 1000, arguments.join_ms / 1000)
    simulation = simulated([graph] * arguments.images, arguments.devices, cost)
    if arguments.svg:
        with writing(arguments.svg) as temporary:
            temporary.write_text(svg(simulation))
    value = {
        "devices": simulation.devices,
        "images": arguments.images,
        "nodes": arguments.images * graph.count(),
        "makespan_s": simulation.makespan_s,
        "utilisation": simulation.utilisation,
        "critical_path_s": simulation.critical_path_s,
        "bound_s": simulation.bound_s,
        "peak_bytes": simulation.peak_bytes,
    }
    text = (
        f"{value['nodes']} nodes on {simulation.devices} device(s): {simulation.makespan_s:.1f} s, the devices are busy"
        f" {simulation.utilisation:.1%} of it\nat least {simulation.bound_s:.1f} s on so many devices,"
        f" {simulation.critical_path_s:.1f} s on any number\n"
        f"what tiles keep for others takes up to {amount(simulation.peak_bytes)}\n"
        f"each line is a device, each digit the last of its step's number\n{timeline(simulation)}"
    )
    answer(arguments, value, text)
