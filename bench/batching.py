"""TokSR at full width: many tiles in one call against one tile in a call, on the same threads. Prints JSON.

It times one step of the denoiser for growing batches, also in eager PyTorch: contenders take turns, and the numbers are
medians of five rounds. Then it times the whole restoration of 64 tiles, once each way.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.export.verify.engines import eager_network
from tilewright.runtime import load
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.inputs import gather

THREADS, ROUNDS, TILES = 2, 5, 64
BATCHES = (1, 4, 16, 31)


def batched(program: Program, batch: int) -> Program:
    """The same program with this many tiles in a call."""
    tiles = {p.tiles: replace(p.tiles, batch=batch) for p in program.passes if p.tiles}
    return replace(program, passes=tuple(replace(p, tiles=tiles[p.tiles]) if p.tiles else p for p in program.passes))


def medians(contenders: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """The median seconds of each contender. They take turns, and the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS + 1):
        for name, contender in contenders.items():
            start = time.perf_counter()
            contender()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(spent[1:]) for name, spent in seconds.items()}


def steps(engine: Any, eager: Any, bundle: Any) -> dict[str, dict[str, float]]:
    """The time of one step for each batch size, in seconds a tile."""
    spec = bundle.manifest.components["step"].inputs
    random = np.random.Generator(np.random.Philox(key=0))

    def feed(batch: int) -> dict[str, Any]:
        shapes = {name: [batch if d == "batch" else d for d in s.shape] for name, s in spec.items()}
        return {name: np.asarray(random.random(shape), np.float32) for name, shape in shapes.items()}

    def call(network: Any, batch: int) -> Callable[[], Any]:
        fed = feed(batch)
        return lambda: network.run(fed, ("tokens_next",))

    contenders = {f"engine, {batch} a call": call(engine, batch) for batch in BATCHES}
    contenders |= {f"eager PyTorch, {batch} a call": call(eager, batch) for batch in (1, 16)}
    seconds_a_tile = {name: seconds / int(name.split()[-3]) for name, seconds in medians(contenders).items()}
    base = seconds_a_tile["engine, 1 a call"]
    return {name: {"seconds_a_tile": s, "throughput_ratio": base / s} for name, s in seconds_a_tile.items()}


def restorations(restorer: Any, tile: int, overlap: int) -> dict[str, dict[str, float]]:
    """The time of one picture of 64 tiles, and of 64 pictures of one tile, after a warm-up of one tile."""
    program, scale = restorer.bundle.program, restorer.bundle.program.scale
    inputs = gather(restorer.bundle, {})

    def seconds(tiles_a_side: int, batch: int, times: int) -> float:
        side = (tile + (tiles_a_side - 1) * (tile - overlap)) // scale
        rgb = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (side, side, 3), np.uint8)
        start = time.perf_counter()
        for _ in range(times):
            job = Job(Enlarged(rgb, scale, program.multiple_px, tile), inputs=inputs)
            run(batched(program, batch), restorer.engines, restorer.constants, job)
        return time.perf_counter() - start

    seconds(1, 1, 1)
    spent = {"one plan, 16 a call": seconds(8, 16, 1), "a restoration a tile": seconds(1, 1, TILES)}
    base = spent["a restoration a tile"]
    return {name: {"seconds": s, "throughput_ratio": base / s} for name, s in spent.items()}


def main(path: Path) -> None:
    torch.set_num_threads(THREADS)
    results: dict[str, Any] = {"threads": THREADS, "tiles": TILES}
    for memory in ("fast", "low"):
        with load(path, memory=memory, threads=THREADS) as restorer, torch.no_grad():
            eager = eager_network(restorer.bundle, "step", None)
            results[f"one step, memory {memory}"] = steps(restorer.engines["step"], eager, restorer.bundle)
            results[f"whole restoration, memory {memory}"] = restorations(restorer, 256, 32)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of toksr with full sizes")
    main(parser.parse_args().bundle)
