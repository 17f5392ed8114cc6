"""Whole restorations by an older version of Tilewright, and by engines of this one, on the same picture.

Every contender has its own process, and they take turns. `--old` is a checkout of the older version, and `--old-bundle`
the bundle that it built. Prints JSON.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS = 3
CONTEND = """
import inspect, json, re, sys, time
from pathlib import Path
import numpy as np
from tilewright.runtime.restore import load

bundle, photo, picture, engine, memory, options, words = json.loads(sys.argv[1])
takes = inspect.signature(load).parameters
start = time.perf_counter()
restorer = load(bundle, memory=memory, **({"engine": engine} if engine and "engine" in takes else {}))
words = words if "engine" in takes else {"inputs": words}  # as the older version takes them
print(json.dumps({"open_s": time.perf_counter() - start, "engines": getattr(restorer, "ran", {}).get("engines")}))
for _ in sys.stdin:
    start, computed = time.perf_counter(), time.process_time()
    image = restorer.restore(photo, **options, **words).image
    seconds, computed = time.perf_counter() - start, time.process_time() - computed
    np.save(picture, image)
    peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    print(json.dumps((seconds, computed, peak)), flush=True)
"""


def main(arguments: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as work:
        contenders = {"old": (arguments.old_bundle, None)} | {
            name: (arguments.bundle, None if name == "default" else name) for name in arguments.engines
        }
        processes = {n: start(n, *which, arguments, Path(work)) for n, which in contenders.items()}
        opened = {name: json.loads(readline(process)) for name, process in processes.items()}
        times: dict[str, list[float]] = {name: [] for name in processes}
        computed: dict[str, list[float]] = {name: [] for name in processes}
        peaks: dict[str, int] = {}
        for _ in range(arguments.rounds + 1):
            for name, process in processes.items():
                assert process.stdin
                process.stdin.write("\n")
                process.stdin.flush()
                seconds, cpu_s, peaks[name] = json.loads(readline(process))
                times[name].append(seconds)
                computed[name].append(cpu_s)
        for process in processes.values():
            process.kill()
        pictures = {name: np.load(Path(work) / f"{name}.npy") for name in processes}
    rows = {
        name: opened[name]
        | {
            "median_s": statistics.median(runs[1:]),
            "first_s": runs[0],
            "peak_rss_bytes": peaks[name],  # with the pages of mapped files
            "median_cpu_s": statistics.median(computed[name][1:]),
            "ratio_to_old": ratio(runs, times["old"]),
            "cpu_ratio_to_old": ratio(computed[name], computed["old"]),  # for a machine that is not idle
            "psnr_to_old_db": psnr(pictures[name], pictures["old"]),
        }
        for name, runs in times.items()
    }
    height, width = pictures["old"].shape[:2]
    return {
        "what": f"{arguments.what}, {arguments.photo.name}, result {width}x{height}",
        "old": arguments.commit,
        "memory": arguments.memory,
        "rounds": arguments.rounds,
        "load": os.getloadavg()[2],
        "rows": rows,
    }


def start(name: str, bundle: Path, engine: str | None, arguments: argparse.Namespace, work: Path) -> Any:
    words: list[Any] = [str(bundle), str(arguments.photo), str(work / f"{name}.npy"), engine]
    words += [arguments.memory, arguments.options, arguments.words]
    environment = dict(os.environ)
    if name == "old":
        folder = work / "old" / "tilewright"
        folder.mkdir(parents=True)
        for part in ("calib", "export", "kernels", "runtime"):
            (folder / part).symlink_to(arguments.old.resolve() / part)
        packages = next(path for path in sys.path if (Path(path) / "numpy").is_dir())
        environment["PYTHONPATH"] = os.pathsep.join((str(folder.parent), packages))
    command = [sys.executable, *(["-S"] if name == "old" else []), "-c", CONTEND, json.dumps(words)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


def readline(process: Any) -> str:
    return str(process.stdout.readline()) or sys.exit("a contender ended")


def ratio(runs: list[float], old: list[float]) -> float:
    """The median over all rounds but the first."""
    return statistics.median(a / b for a, b in zip(runs[1:], old[1:], strict=True))


def psnr(one: Any, other: Any) -> float:
    error = float(np.mean((one.astype(np.float64) - other) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-10)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--what", required=True, help="the system and the preset, for the report")
    parser.add_argument("--old", type=Path, required=True, help="a checkout of the older version")
    parser.add_argument("--commit", required=True, help="its commit, for the report")
    parser.add_argument("--old-bundle", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=["default"], help="of this version (default: what it chooses)")
    parser.add_argument("--photo", type=Path, required=True)
    parser.add_argument("--options", type=json.loads, default={}, help="for example '{\"steps\": 4}'")
    parser.add_argument("--words", type=json.loads, default={}, help="arguments of the bundle")
    parser.add_argument("--memory", choices=("fast", "low"), default="fast")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    print(json.dumps(main(parser.parse_args()), indent=1))
