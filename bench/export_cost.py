"""The cost of exporting a system in full size: CPU and wall seconds, peak memory, bytes of graphs and written weights.

Prints JSON. Without a folder of weights, it first writes stand-ins of the published files.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def engine_bytes(bundle: Path) -> dict[str, int]:
    """Engine -> the bytes of its files in the bundle. Engines share files, and none of these holds weights."""
    engines: dict[str, set[str]] = {}
    for component in json.loads((bundle / "bundle.json").read_text())["components"].values():
        for engine in component["engines"]:
            engines.setdefault(engine["name"], set()).update(engine["files"])
    return {name: sum((bundle / file).stat().st_size for file in files) for name, files in engines.items()}


def cost(system: str, weights: Path, work: Path, targets: str) -> dict[str, Any]:
    """Build from an empty cache, in a separate process."""
    out, cache = work / f"{system}-bundle", work / f"{system}-cache"
    words = ["export", "build", system, "--weights", str(weights), "--target", targets, "-o", str(out)]
    command = [sys.executable, "-m", "tilewright.cli.main", *words, "--verify", "never"]
    start = time.perf_counter()
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(cache)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"the build failed with status {status}")
    files = [f for f in out.rglob("*") if f.is_file()]
    written = [f for root in (out, cache) for f in root.rglob("*.safetensors") if f.name != "constants.safetensors"]
    return {
        "what": f"export build {system} --weights DIR --target {targets} --verify never, from an empty cache",
        "wall_seconds": seconds,
        "cpu_seconds": used.ru_utime + used.ru_stime,
        "peak_rss_bytes": used.ru_maxrss * 1024,
        "graph_bytes": {f.relative_to(out).as_posix(): f.stat().st_size for f in files if f.suffix == ".onnx"},
        "engine_bytes": engine_bytes(out),
        "bundle_bytes": sum(f.stat().st_size for f in files),
        "weight_bytes_written": sum(f.stat().st_size for f in written),
        "tensors": json.loads((out / "reports" / "weights.json").read_text()),
    }


def main(system: str, weights: Path | None, targets: str) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if weights is None:
            weights = work / "stand-in"
            command = [sys.executable, "-m", "tilewright.cli.main", "export", "stand-in", system, "-o", str(weights)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(json.dumps(cost(system, weights, work, targets), indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("system")
    parser.add_argument("--weights", type=Path, help="a folder with the weights")
    parser.add_argument("--target", default="ort,openvino", help="of the engines (default: ort,openvino)")
    arguments = parser.parse_args()
    main(arguments.system, arguments.weights, arguments.target)
