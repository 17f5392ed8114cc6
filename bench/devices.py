"""One process with two CPU devices of one thread, against two processes with one device each. Prints JSON.

Both get the same tiles. The processes share no work, so they show what the machine can do. The contenders take turns;
numbers are medians. The bundles: HiTokSR at full size, for one large picture (the processes get half of it each), and
TokSR tiny, for 16 pictures at once (the processes get 8 each).
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from tilewright.runtime import Restorer, load

ROUNDS = 3
PICTURES = 16


def picture(restorer: Restorer, rows: int, columns: int) -> np.ndarray:
    """An image that is cut into so many tiles."""
    program = restorer.bundle.program
    tiles = next(p.tiles for p in program.passes if p.tiles)
    height, width = (tiles.px + (count - 1) * (tiles.px - tiles.overlap_px) for count in (rows, columns))
    size = height // program.scale, width // program.scale, 3
    return np.random.Generator(np.random.Philox(key=0)).integers(0, 256, size, np.uint8)


def large(restorer: Restorer, share: int) -> None:
    """A picture of 8 tiles, or a part of it."""
    restorer.restore(picture(restorer, 2, 4 // share))


def many(restorer: Restorer, share: int) -> None:
    """Pictures of 16 tiles that are submitted together."""
    small = picture(restorer, 4, 4)
    for ticket in [restorer.submit(small, seed=seed) for seed in range(PICTURES // share)]:
        ticket.result()


def process(
    bundle: Path, work: Callable[[Restorer, int], None], devices: list[str], share: int, told: Connection
) -> None:
    """Work whenever it is told to, and say when it is done."""
    with load(bundle, devices=devices, threads=1) as restorer:
        told.send("ready")
        while told.recv():
            work(restorer, share)
            told.send("done")


def compare(bundle: Path, work: Callable[[Restorer, int], None]) -> dict[str, float]:
    """The seconds of both contenders, and the throughput of two devices relative to that of two processes."""
    context = multiprocessing.get_context("spawn")

    def start(devices: list[str], share: int) -> Connection:
        ours, theirs = context.Pipe()
        context.Process(target=process, args=(bundle, work, devices, share, theirs), daemon=True).start()
        ours.recv()
        return ours

    contenders = {
        "two_devices_s": [start(["cpu:0", "cpu:1"], 1)],
        "two_processes_s": [start(["cpu:0"], 2) for _ in range(2)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 1):
        for name, workers in contenders.items():
            begin = time.perf_counter()
            for worker in workers:
                worker.send(True)
            for worker in workers:
                worker.recv()
            seconds[name].append(time.perf_counter() - begin)
    for worker in [w for workers in contenders.values() for w in workers]:
        worker.send(False)
    medians = {name: statistics.median(spent[1:]) for name, spent in seconds.items()}
    ratios = [b / a for a, b in zip(seconds["two_devices_s"][1:], seconds["two_processes_s"][1:], strict=True)]
    return medians | {"throughput_ratio": statistics.median(ratios)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--large", type=Path, required=True, help="a bundle of hitoksr with full sizes")
    parser.add_argument("--many", type=Path, required=True, help="a bundle of toksr tiny")
    arguments = parser.parse_args()
    results = {
        "hitoksr full, one picture of 8 tiles": compare(arguments.large, large),
        f"toksr tiny, {PICTURES} pictures of 16 tiles": compare(arguments.many, many),
    }
    print(json.dumps({"rounds": ROUNDS, "threads_of_a_device": 1} | results, indent=1))
