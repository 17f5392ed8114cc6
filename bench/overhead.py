"""The runtime's share of a restoration to 2048x2048, outside of engines, with a tiny bundle. Prints JSON."""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from tilewright.runtime import load

RUNS = 15

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of hitoksr tiny")
    bundle = parser.parse_args().bundle
    image = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (512, 512, 3), np.uint8)
    totals, shares = [], []
    with load(bundle, threads=2) as restorer:
        for _ in range(RUNS + 1):
            start = time.perf_counter()
            restored = restorer.restore(image)
            totals.append(time.perf_counter() - start)
            in_engines = restored.seconds["generate"] + restored.seconds["decode"]
            shares.append((totals[-1] - in_engines) / totals[-1])
    report = {
        "what": "restore of an array to 2048x2048, 25 tiles of 512 px; share of time outside engines",
        "threads": 2,
        "runs": RUNS,
        "restore_median_s": statistics.median(totals[1:]),
        "overhead_median": statistics.median(shares[1:]),
        "overhead_max": max(shares[1:]),
    }
    print(json.dumps(report, indent=1))
