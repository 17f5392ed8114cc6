"""Engines in 8 bits of a demo bundle beside what other tools make of the same graphs, on the same held-out pictures.

BUNDLE has its engines in 8 bits, and STANDARD is the same model with `--ops standard`. --tool NAME=PYTHON names a tool
of bench/quantisers.py, and a Python that has it. The calls of calibration come from calibration pictures, and never
from those that judge. Prints JSON.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from tilewright.calib.judge.trial import Trial
from tilewright.export.verify.engines import runnable
from tilewright.runtime import load
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines.machine import usable_cores
from tilewright.runtime.engines.ort import open_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from train import data

SIDE = 24  # of a picture: one tile
ROUNDS = 3
CALLS = 96  # the most that a tool is calibrated with
BACKENDS = {"nncf": "openvino", "ort": "ort", "quanto": "ort", "modelopt": "openvino"}
FRONT = Path(__file__).with_name("quantisers.py")


def pictures(split: str, side: int, most: int, folder: Path) -> tuple[list[Path], list[Path]]:
    """The middles of so many pictures, and of their originals."""
    folder.mkdir()
    paths, originals = [], []
    every = [*data.kept_back(split)]
    for place in range(most):
        name, sharp, small = every[place * len(every) // most]
        top, left = ((size - side) // 2 for size in small.shape[:2])
        paths.append(folder / f"{name}.png")
        originals.append(folder / f"{name}.original.png")
        Image.fromarray(small[top : top + side, left : left + side]).save(paths[-1])
        s = data.SCALE
        Image.fromarray(sharp[s * top : s * (top + side), s * left : s * (left + side)]).save(originals[-1])
    return paths, originals


def standard_graphs(standard: Path, folder: Path, calibration: list[Path], steps: int | None, only: list[str]) -> None:
    """The graphs of the components, and inputs of their calls for calibration pictures."""
    words = [sys.executable, "-m", "tilewright.cli.main", "export", "onnx", standard, "--fold", "-o", folder, "-q"]
    subprocess.run([*map(str, words)], check=True, stdout=sys.stderr)
    with Trial(read_bundle(standard), calibration, steps=steps) as trial:
        calls = trial.calls(CALLS)
    for graph in folder.glob("*.onnx"):
        if graph.stem not in only:
            graph.unlink()
            continue
        inputs = {f"{i}/{n}": a for i, (call, _) in enumerate(calls[graph.stem].first) for n, a in call.items()}
        np.savez(graph.with_suffix(".npz"), **inputs)


def quantised(tool: str, python: str, folder: Path) -> dict[str, Any]:
    """What a tool's process says, or why it failed."""
    ran = subprocess.run([python, str(FRONT), tool, str(folder)], capture_output=True, text=True, check=False)
    if ran.returncode:
        return {"failed": (ran.stderr.strip().splitlines() or ["no reason"])[-1]}
    told: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("standard", type=Path)
    parser.add_argument("--components", required=True, help="those that tools quantise, separated by commas")
    parser.add_argument("--tool", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--calibration", type=int, default=12)
    parser.add_argument("--steps", type=int)
    arguments = parser.parse_args()
    bundle, components = read_bundle(arguments.bundle), arguments.components.split(",")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        paths, originals = pictures("held-out", SIDE, arguments.images, work / "held-out")
        tools: dict[str, dict[str, Any]] = {}
        if arguments.tool:
            calibration, _ = pictures("calibration", SIDE, arguments.calibration, work / "calibration")
            standard_graphs(arguments.standard, work / "onnx", calibration, arguments.steps, components)
        for word in arguments.tool:
            tool, _, python = word.partition("=")
            tools[tool] = quantised(tool, python, work / "onnx")
            print(tool, tools[tool], file=sys.stderr, flush=True)
        with Trial(bundle, paths, originals=originals, steps=arguments.steps) as trial:
            calls, contenders = trial.calls(), {}
            for name in runnable(bundle)[0]:
                restorer = load(bundle, engine=name)
                specs = [c for c, spec in restorer.specs.items() if spec.name == name]
                contenders[name] = {c: restorer.engines[c] for c in specs}
            for tool in [tool for tool, told in tools.items() if "failed" not in told]:
                opened = opened_onnx if BACKENDS[tool] == "ort" else OpenvinoGraph
                try:
                    engines = {c: opened(work / "onnx" / tool / c) for c in components}
                except Exception as error:  # a backend may refuse another tool's graph; then that is the result
                    tools[tool]["refused"] = f"{BACKENDS[tool]}: {str(error).splitlines()[0][:200]}"
                    continue
                contenders[f"{tool}, {BACKENDS[tool]}"] = engines
            result = {}
            for name, engines in contenders.items():
                score = trial.score(engines)
                result[name] = {
                    "mean_db": score.mean,
                    "worst_db": score.worst,
                    "ssim": float(np.mean(score.ssim)),
                    "changed_choices": score.changed,
                    "original_db": float(np.mean(score.truth_db)),
                    "drift": {value: list(steps) for value, steps in score.drift.items()},
                    "seconds": {c: [] for c in engines},
                }
                print(name, {k: v for k, v in result[name].items() if k != "seconds"}, file=sys.stderr, flush=True)
            exact = float(np.mean(trial.score({}).truth_db))
            for _ in range(ROUNDS):
                for name, engines in contenders.items():
                    for component, engine in engines.items():
                        start = time.perf_counter()
                        for inputs, outputs in calls[component].first:
                            engine.run(inputs, outputs)
                        result[name]["seconds"][component].append(time.perf_counter() - start)
    for row in result.values():
        row["lost_db"] = exact - row["original_db"]
        row["seconds"] = {c: median(times) for c, times in row["seconds"].items()}
    answer = {"images": len(paths), "side_px": SIDE * data.SCALE, "steps": arguments.steps, "threads": usable_cores()}
    print(json.dumps(answer | {"float32_against_originals_db": exact, "tools": tools, "engines": result}, indent=1))


def opened_onnx(path: Path) -> Any:
    return open_graph(path.with_suffix(".onnx"), {}, precision="int8", native=False)


class OpenvinoGraph:
    """A graph in OpenVINO's format, with its defaults."""

    def __init__(self, path: Path) -> None:
        import openvino

        settings, file = {"PERFORMANCE_HINT": "LATENCY"}, path.with_suffix(".xml")
        file = file if file.is_file() else path.with_suffix(".onnx")
        self.compiled = openvino.Core().compile_model(str(file), "CPU", settings)

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        results = self.compiled(dict(inputs))
        return {name: np.array(results[self.compiled.output(name)]) for name in outputs}

    def close(self) -> None:
        """Nothing to free."""


if __name__ == "__main__":
    main()
