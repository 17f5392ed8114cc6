"""The CPU engines of one bundle of HiTokSR against eager PyTorch and stock OpenVINO on the same graph.

Every contender has its own process, so that thread pools do not disturb each other. They take turns, so that a drift of
the machine hits all alike. Memory is what the process holds when it is ready to run. Prints JSON.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.read import read_bundle

THREADS = 2
ROUNDS = 5
Run = Callable[[Any], Any]


def engine(name: str) -> Callable[[Path, Path], Run]:
    def ready(bundle: Path, work: Path) -> Run:
        from tilewright.runtime import load

        restorer = load(bundle, engine=name, threads=THREADS)

        def run(image: Any) -> Any:
            codes = restorer.engines["generate"].run({"image": image}, ["codes"])["codes"]
            return restorer.engines["decode"].run({"codes": codes}, ["image"])["image"]

        return run

    return ready


def stock(hint: str) -> Callable[[Path, Path], Run]:
    """OpenVINO alone, on the folder that `export onnx` writes, with standard operators."""

    def ready(bundle: Path, work: Path) -> Run:
        import openvino

        settings = {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": THREADS, "PERFORMANCE_HINT": "LATENCY"}
        core = openvino.Core()
        generate, decode = (
            core.compile_model(str(work / "onnx" / f"{name}.onnx"), "CPU", settings) for name in ("generate", "decode")
        )
        codes = next(port for port in generate.outputs if "codes" in port.get_names())

        def run(image: Any) -> Any:
            return decode({"codes": generate({"image": image})[codes]})[0]

        return run

    return ready


def eager(bundle: Path, work: Path) -> Run:
    import torch

    from tilewright.export.verify.eager import eager_network

    torch.set_num_threads(THREADS)
    sealed = read_bundle(bundle)
    generate, decode = (eager_network(sealed, name, None).network for name in ("generate", "decode"))

    def run(image: Any) -> Any:
        with torch.inference_mode():
            return decode(generate(torch.from_numpy(image))[0]).float().numpy()

    return run


CONTENDERS = {
    "eager float32": eager,
    "ort-float32": engine("ort-float32"),
    "openvino-float32": engine("openvino-float32"),
    "openvino-bfloat16": engine("openvino-bfloat16"),
    "ort-int8": engine("ort-int8"),
    "openvino-int8": engine("openvino-int8"),
    "stock OpenVINO, float32": stock("f32"),
    "stock OpenVINO, bfloat16": stock("bf16"),
}


def contend(name: str, bundle: Path, work: Path, side: int, pipe: Connection) -> None:
    start = time.perf_counter()
    run = CONTENDERS[name](bundle, work)
    opened = time.perf_counter() - start
    image = np.random.Generator(np.random.Philox(key=0)).random((1, 3, side, side), np.float32)
    status = Path("/proc/self/status").read_text()
    held = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) * 1024
    pipe.send((opened, held))
    while pipe.recv():
        start = time.perf_counter()
        picture = run(image)
        pipe.send((time.perf_counter() - start, picture))


def psnr(one: Any, other: Any) -> float:
    error = float(np.mean((one.astype(np.float64).clip(0, 1) - other.clip(0, 1)) ** 2))
    return 10 * float(np.log10(1 / max(error, 1e-20)))


def measure(bundle: Path, work: Path, rounds: int, side: int) -> dict[str, Any]:
    start = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes, opened = [], {}
    listed = read_bundle(bundle).manifest.components["generate"].engines
    absent = {"ort-int8", "openvino-int8"} - {spec.name for spec in listed}
    for name in [name for name in CONTENDERS if name not in absent]:
        pipes[name], theirs = start.Pipe()
        processes.append(start.Process(target=contend, args=(name, bundle, work, side, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a contender's end is noticed
        opened[name] = pipes[name].recv()  # one gets ready at a time
    times: dict[str, list[float]] = {name: [] for name in pipes}
    pictures = {}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            time.sleep(0.2)  # until the last contender's threads have stopped spinning
            pipe.send(True)
            seconds, pictures[name] = pipe.recv()
            times[name].append(seconds)
    for process in processes:
        process.kill()
    first = next(iter(CONTENDERS))
    rows = {
        name: {
            "median_s": statistics.median(runs[1:]),
            "first_s": runs[0],
            "open_s": opened[name][0],
            "held_bytes": opened[name][1],
            "ratio_to_eager": statistics.median(a / b for a, b in zip(runs[1:], times[first][1:], strict=True)),
            "psnr_to_eager_db": psnr(pictures[name], pictures[first]),
        }
        for name, runs in times.items()
    }
    return {"what": f"HiTokSR, {side}x{side} output, batch 1", "threads": THREADS, "rounds": rounds, "rows": rows}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, required=True, help="with all engines of ort and openvino; int8 if it has any"
    )
    folder = "a folder with onnx/, which `export onnx --fold` wrote of a bundle with --ops standard"
    parser.add_argument("--work", type=Path, required=True, help=folder)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--side", type=int, default=512)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.bundle, arguments.work, arguments.rounds, arguments.side), indent=1))
