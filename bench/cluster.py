"""Two devices of a Ray cluster on this machine, against two devices of one process. Prints JSON.

Each device has one thread, and both contenders restore the same picture of 64 tiles by turns. Ray's processes run all
of the time, also while the other contender works, as they would in a cluster. They have the priority of this process:
by default, Ray gives them a low one. Numbers are medians.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import ray

from tilewright.runtime import Restorer, load

ROUNDS = 5
ROWS, COLUMNS = 8, 8
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
DEVICES = ["cpu:0", "cpu:1"]


def picture(restorer: Restorer) -> np.ndarray:
    """An image that is cut into 64 tiles."""
    program = restorer.bundle.program
    tiles = next(p.tiles for p in program.passes if p.tiles)
    height, width = (tiles.px + (count - 1) * (tiles.px - tiles.overlap_px) for count in (ROWS, COLUMNS))
    size = height // program.scale, width // program.scale, 3
    return np.random.Generator(np.random.Philox(key=0)).integers(0, 256, size, np.uint8)


def main() -> None:
    """Measure a bundle."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    bundle = parser.parse_args().bundle
    start = ["start", "--head", "--num-cpus", "2", "--include-dashboard=false", "--disable-usage-stats"]
    environment = os.environ | {"RAY_worker_niceness": "0"}
    subprocess.run([*RAY, *start], check=True, stdout=sys.stderr, env=environment)
    seconds: dict[str, list[float]] = {"threads": [], "cluster": []}
    try:
        with (
            load(bundle, devices=DEVICES, threads=1) as threads,
            load(bundle, devices=DEVICES, threads=1, cluster="auto") as cluster,
        ):
            image = picture(threads)
            same = True
            for _ in range(ROUNDS + 1):
                results = []
                for name, restorer in {"threads": threads, "cluster": cluster}.items():
                    begin = time.perf_counter()
                    results.append(restorer(image))
                    seconds[name].append(time.perf_counter() - begin)
                same &= np.array_equal(*results)
            engines = threads.ran["engines"]
        ray.shutdown()
    finally:
        subprocess.run([*RAY, "stop"], check=True, stdout=sys.stderr)
    medians = {f"{name}_s": statistics.median(values[1:]) for name, values in seconds.items()}
    ratio = medians["threads_s"] / medians["cluster_s"]
    versions = {"ray": ray.__version__, "engines": engines}
    print(json.dumps({**medians, "throughput_ratio": ratio, "same_bytes": same, "tiles": ROWS * COLUMNS, **versions}))


if __name__ == "__main__":
    main()
