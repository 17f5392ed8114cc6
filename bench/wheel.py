"""HiTokSR from installed wheels, and from a clone after `make native`, with the same bundle and picture.

Every contender has its own environment and process. They take turns in random order, so that a drift of the machine
hits all alike. Prints JSON; `bench/run.py` stores it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
ROUNDS = 61
CLONE = "clone after make native"
AGAIN = "the same clone again"  # its ratio is the noise of the machine


def contend(bundle: Path, side: int) -> None:
    """Answer every line of standard input with a run: seconds, and CPU seconds of all cores."""
    from tilewright.runtime import load
    from tilewright.runtime.engines import ort

    restorer = load(bundle, threads=THREADS)
    image = np.random.Generator(np.random.Philox(key=0)).random((1, 3, side, side), np.float32)
    print(json.dumps({"module": ort.__file__, "engine": ort.version()}), flush=True)
    for _ in sys.stdin:
        start, cpu = time.perf_counter(), time.process_time()
        codes = restorer.engines["generate"].run({"image": image}, ["codes"])["codes"]
        restorer.engines["decode"].run({"codes": codes}, ["image"])
        print(json.dumps([time.perf_counter() - start, time.process_time() - cpu]), flush=True)


def environment(folder: Path, wheel: Path) -> Path:
    """The Python of a new environment with the wheel, and with the other packages of this environment."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, stdout=sys.stderr)
    (site / "others.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    return python


def measure(bundle: Path, wheels: list[Path], side: int, rounds: int, work: Path) -> dict[str, Any]:
    pythons = dict.fromkeys((CLONE, AGAIN), Path(sys.executable))
    pythons |= {wheel.stem.split("-", 2)[2]: environment(work / wheel.stem, wheel) for wheel in wheels}
    variables = {name: text for name, text in os.environ.items() if name != "TILEWRIGHT_NATIVE"}
    processes, engines = {}, {}
    for name, python in pythons.items():
        words = [python, __file__, "--contend", "--bundle", bundle, "--side", str(side)]
        processes[name] = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=variables
        )
        ready = json.loads(processes[name].stdout.readline())  # type: ignore[union-attr]
        if name not in (CLONE, AGAIN) and not Path(ready["module"]).is_relative_to(work):
            sys.exit(f"{name} runs {ready['module']}, not what the wheel holds")
        engines[name] = ready["engine"]
    timings: dict[str, list[tuple[float, float]]] = {name: [] for name in processes}
    load_before = os.getloadavg()[0]
    order = np.random.Generator(np.random.Philox(key=0))
    for _ in range(rounds + 1):
        for name in order.permutation(list(processes)):  # so that none always runs after the same one
            process = processes[name]
            process.stdin.write("\n")  # type: ignore[union-attr]
            timings[name].append(json.loads(process.stdout.readline()))  # type: ignore[union-attr]
    for process in processes.values():
        process.communicate()
    rows = {}
    for name, runs in timings.items():
        pairs = list(zip(runs[1:], timings[CLONE][1:], strict=True))
        rows[name] = {
            "engine": engines[name],
            "median_s": statistics.median(ours[0] for ours, _ in pairs),
            "min_s": min(ours[0] for ours, _ in pairs),
            "median_cpu_s": statistics.median(ours[1] for ours, _ in pairs),
            "ratio_to_clone": statistics.median(ours[0] / clone[0] for ours, clone in pairs),
            "cpu_ratio_to_clone": statistics.median(ours[1] / clone[1] for ours, clone in pairs),
        }
    return {
        "what": f"HiTokSR {bundle.name}, {side}x{side} output, batch 1, float32",
        "threads": THREADS,
        "rounds": rounds,
        "load": [round(load_before, 1), round(os.getloadavg()[0], 1)],
        "rows": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of hitoksr")
    parser.add_argument("--wheels", type=Path, nargs="+", default=[], help="what make wheel built")
    parser.add_argument("--side", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--contend", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contend:
        contend(arguments.bundle, arguments.side)
    else:
        with tempfile.TemporaryDirectory() as folder:
            report = measure(arguments.bundle, arguments.wheels, arguments.side, arguments.rounds, Path(folder))
        print(json.dumps(report, indent=1))
