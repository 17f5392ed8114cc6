"""The runtime's share of a restoration, outside of engines: HiTokSR tiny, 25 and 1,000 tiles. Prints JSON."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime import Restorer, load

THREADS = 2
TILES = {"25 tiles": ((512, 512), 15), "1000 tiles": ((2816, 4496), 1)}  # input height and width, runs


def measure(restorer: Restorer, height: int, width: int, runs: int) -> dict[str, Any]:
    """Medians of some restorations."""
    image = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (height, width, 3), np.uint8)
    totals, shares = [], []
    for _ in range(runs):
        start = time.perf_counter()
        restored = restorer.restore(image)
        totals.append(time.perf_counter() - start)
        in_engines = restored.seconds["generate"] + restored.seconds["decode"]
        shares.append((totals[-1] - in_engines) / in_engines)
    return {
        "runs": runs,
        "restore_median_s": statistics.median(totals),
        "overhead_of_engine_time_median": statistics.median(shares),
        "overhead_of_engine_time_max": max(shares),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of hitoksr tiny")
    with load(parser.parse_args().bundle, threads=THREADS) as restorer:
        measure(restorer, 512, 512, 1)  # a warm-up
        results = {name: measure(restorer, *size, runs) for name, (size, runs) in TILES.items()}
    print(json.dumps({"what": "tiles of 512 px, times 4", "threads": THREADS} | results, indent=1))
