"""What exporting HiTokSR full costs: peak memory, seconds, bytes of graphs, bytes of weights written. Prints JSON."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="a folder with the weights")
    parser.add_argument("--out", type=Path, required=True, help="the bundle to make; must not exist")
    arguments = parser.parse_args()
    words = ["export", "build", "hitoksr", "--preset", "full", "--weights", str(arguments.weights)]
    command = [sys.executable, "-m", "tilewright.export.cli", *words, "-o", str(arguments.out), "--verify", "never"]
    cache = arguments.out.with_suffix(".cache")
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env={**os.environ, "TILEWRIGHT_CACHE_DIR": str(cache)}, stdout=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"the build failed with status {status}")
    files = [f for f in arguments.out.rglob("*") if f.is_file()]
    found = {
        "what": "export build hitoksr --preset full --weights DIR --verify never, from an empty cache",
        "seconds": seconds,
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "graph_bytes": sum(f.stat().st_size for f in files if f.suffix == ".onnx"),
        "bundle_bytes": sum(f.stat().st_size for f in files),
        "weight_bytes_written": sum(
            f.stat().st_size for root in (arguments.out, cache) for f in root.rglob("*.safetensors")
        ),
    }
    print(json.dumps(found, indent=1))
