"""The time of `import tilewright.runtime` in a fresh interpreter, and of `import torch`. Prints JSON."""

import json
import statistics
import subprocess
import sys
import time

RUNS = 9


def seconds(code: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    codes = {"nothing": "pass", "tilewright.runtime": "import tilewright.runtime", "torch": "import torch"}
    runs: dict[str, list[float]] = {name: [] for name in codes}
    for _ in range(RUNS + 1):
        for name, code in codes.items():
            runs[name].append(seconds(code))
    medians = {name: statistics.median(values[1:]) for name, values in runs.items()}
    print(
        json.dumps({"what": "seconds of a fresh interpreter importing it", "runs": RUNS, "median_s": medians}, indent=1)
    )
