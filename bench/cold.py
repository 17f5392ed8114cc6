"""From `load` to the first pixels in a fresh process that never loads PyTorch: medians. Prints JSON."""

import argparse
import json
import statistics
import subprocess
import sys

RUNS = 9
CODE = """
import sys, time
begun = time.perf_counter()
import numpy as np
from tilewright.runtime import load
imported, first = time.perf_counter(), []
with load(sys.argv[1]) as restorer:
    loaded = time.perf_counter()
    restorer(np.zeros((24, 24, 3), np.uint8), on_part=lambda *part: first.append(time.perf_counter()))
assert "torch" not in sys.modules
print(imported - begun, loaded - imported, first[0] - imported)
"""


def run(bundle: str) -> list[float]:
    """The seconds of the imports, of `load`, and from `load` to the first pixels."""
    printed = subprocess.run([sys.executable, "-c", CODE, bundle], check=True, stdout=subprocess.PIPE, text=True)
    return [float(word) for word in printed.stdout.split()]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    bundle = parser.parse_args().bundle
    runs = [run(bundle) for _ in range(RUNS + 1)][1:]
    medians = [statistics.median(times) for times in zip(*runs, strict=True)]
    print(json.dumps(dict(zip(("imports_s", "load_s", "to_first_pixels_s"), medians, strict=True)) | {"runs": RUNS}))
