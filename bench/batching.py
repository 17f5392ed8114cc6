"""TokSR at full width: many tiles in one call against one tile in a call, on the same threads. Prints JSON.

It times one step of the denoiser for growing batches, also in eager PyTorch: contenders take turns, and the numbers are
medians of three rounds. Then it times whole restorations of 16 pictures of one tile, which are submitted together, with
16 tiles and with one tile in a call; these take turns too, one round after a warm-up.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tilewright.export.verify.eager import eager_network
from tilewright.runtime import Restorer, load
from tilewright.runtime.bundle.program import ANY

THREADS, ROUNDS, RESTORATIONS, PICTURES, TILE_PX = 2, 3, 1, 16, 256
BATCHES = (1, 4, 16)


def medians(contenders: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> dict[str, float]:
    """The median seconds of each contender. They take turns, and the first round does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds + 1):
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
        sizes = {"batch": batch, ANY: 1}
        shapes = {name: [sizes.get(d, d) if isinstance(d, str) else d for d in s.shape] for name, s in spec.items()}
        return {name: np.asarray(random.random(shape), np.float32) for name, shape in shapes.items()}

    def call(network: Any, batch: int) -> Callable[[], Any]:
        fed = feed(batch)
        return lambda: network.run(fed, ("tokens_next",))

    contenders = {f"engine, {batch} a call": call(engine, batch) for batch in BATCHES}
    contenders |= {f"eager PyTorch, {batch} a call": call(eager, batch) for batch in (1, BATCHES[-1])}
    seconds_a_tile = {name: seconds / int(name.split()[-3]) for name, seconds in medians(contenders).items()}
    base = seconds_a_tile["engine, 1 a call"]
    return {name: {"seconds_a_tile": s, "throughput_ratio": base / s} for name, s in seconds_a_tile.items()}


def restorations(path: Path, memory: str) -> dict[str, dict[str, float]]:
    """The time of whole restorations, with 16 tiles and with one tile in a call."""
    random = np.random.Generator(np.random.Philox(key=1))
    with (
        load(path, memory=memory, threads=THREADS, batch=16) as many,
        load(path, memory=memory, threads=THREADS, batch=1) as single,
    ):
        scale = many.bundle.program.scale
        image = random.integers(0, 256, (TILE_PX // scale, TILE_PX // scale, 3), np.uint8)

        def pictures(restorer: Restorer) -> None:
            for ticket in [restorer.submit(image, seed=seed) for seed in range(PICTURES)]:
                ticket.result()

        spent = medians(
            {
                "16 a call": lambda: pictures(many),
                "1 a call": lambda: pictures(single),
            },
            RESTORATIONS,
        )
    return {name: {"seconds": s, "throughput_ratio": spent["1 a call"] / s} for name, s in spent.items()}


def main(path: Path) -> None:
    torch.set_num_threads(THREADS)
    results: dict[str, Any] = {"threads": THREADS}
    for memory in ("fast", "low"):
        with load(path, memory=memory, threads=THREADS) as restorer, torch.no_grad():
            eager = eager_network(restorer.bundle, "step", None)
            results[f"one step, memory {memory}"] = steps(restorer.engines["step"], eager, restorer.bundle)
        results[f"{PICTURES} pictures, memory {memory}"] = restorations(path, memory)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of toksr with full sizes")
    main(parser.parse_args().bundle)
