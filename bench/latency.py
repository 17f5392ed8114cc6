"""HiTokSR at 512x512: our engine, with and without native kernels, against eager PyTorch and a plain export.

Every contender has its own process, so that thread pools do not disturb each other. They take turns, so that a drift of
the machine hits all alike. Prints JSON; `bench/run.py` stores it.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
ROUNDS = 7


def engine(bundle: Path, work: Path) -> Callable[[Any], Any]:
    from tilewright.runtime import load

    restorer = load(bundle, threads=THREADS)

    def run(image: Any) -> Any:
        codes = restorer.engines["generate"].run({"image": image}, ["codes"])["codes"]
        return restorer.engines["decode"].run({"codes": codes}, ["image"])["image"]

    return run


def standard(bundle: Path, work: Path) -> Callable[[Any], Any]:
    """The same graphs without native kernels: our nodes run their standard operators."""
    os.environ["TILEWRIGHT_NATIVE"] = ""
    return engine(bundle, work)


def networks(bundle: Path) -> tuple[Any, Any]:
    import torch

    from tilewright.export.verify.eager import eager_network
    from tilewright.runtime.bundle.read import read_bundle

    torch.set_num_threads(THREADS)
    sealed = read_bundle(bundle)
    return tuple(eager_network(sealed, name, None).network for name in ("generate", "decode"))  # type: ignore[return-value]


def eager(bundle: Path, work: Path) -> Callable[[Any], Any]:
    import torch

    generate, decode = networks(bundle)

    def run(image: Any) -> Any:
        with torch.inference_mode():
            return decode(generate(torch.from_numpy(image))[0]).float().numpy()

    return run


def autocast(bundle: Path, work: Path) -> Callable[[Any], Any]:
    import torch

    plain = eager(bundle, work)

    def run(image: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return plain(image)

    return run


def plain_export(bundle: Path, work: Path) -> Callable[[Any], Any]:
    """The graph of `torch.onnx.export` with its defaults, in a default session."""
    import onnxruntime as ort
    import torch

    from tilewright.export.networks import hitoksr
    from tilewright.kernels.codebook_from_hidden import codebook_from_hidden_reference
    from tilewright.kernels.qkv_norm_rope import qkv_norm_rope_reference

    hitoksr.codebook_from_hidden, hitoksr.qkv_norm_rope = codebook_from_hidden_reference, qkv_norm_rope_reference
    generate, decode = networks(bundle)
    units = [torch.export.Dim(name, min=1, max=512) for name in ("rows", "columns")]
    sessions = []
    for name, network, example, multiple in (
        ("generate", generate, torch.rand(1, 3, 64, 96), 16),
        ("decode", decode, torch.randn(1, 32, 4, 6), 1),
    ):
        file = work / f"plain-{name}.onnx"
        if not file.exists():
            shapes = ({2: multiple * units[0], 3: multiple * units[1]},)
            with torch.no_grad():
                exported = torch.export.export(network, (example,), dynamic_shapes=shapes, strict=False)
                program = torch.onnx.export(exported, verbose=False)
            program.save(file, external_data=True)
        options = ort.SessionOptions()
        options.intra_op_num_threads = THREADS
        sessions.append(ort.InferenceSession(file, options))

    def run(image: Any) -> Any:
        codes = sessions[0].run(None, {sessions[0].get_inputs()[0].name: image})[0]
        return sessions[1].run(None, {sessions[1].get_inputs()[0].name: codes})[0]

    return run


CONTENDERS = {
    "tilewright": engine,
    "tilewright, standard operators": standard,
    "eager fp32": eager,
    "eager bf16 autocast": autocast,
    "plain export": plain_export,
}


def contend(name: str, bundle: Path, work: Path, pipe: Connection) -> None:
    run = CONTENDERS[name](bundle, work)
    image = np.random.Generator(np.random.Philox(key=0)).random((1, 3, 512, 512), np.float32)
    pipe.send(None)
    while pipe.recv():
        start, cpu = time.perf_counter(), time.process_time()
        picture = run(image)
        seconds = time.perf_counter() - start
        pipe.send((seconds, time.process_time() - cpu, float(picture.mean())))


def measure(bundle: Path, work: Path, rounds: int) -> dict[str, Any]:
    start = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in CONTENDERS:
        pipes[name], theirs = start.Pipe()
        processes.append(start.Process(target=contend, args=(name, bundle, work, theirs), daemon=True))
        processes[-1].start()
        theirs.close()  # so that a contender's end is noticed
        pipes[name].recv()  # one gets ready at a time
    timings: dict[str, list[tuple[float, float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            time.sleep(0.2)  # until the last contender's threads have stopped spinning
            pipe.send(True)
            timings[name].append(pipe.recv())
    rows = {}
    for name, runs in timings.items():
        counted = runs[1:]
        rows[name] = {
            "median_s": statistics.median(s for s, _, _ in counted),
            "min_s": min(s for s, _, _ in counted),
            "cores_used": statistics.median(cpu / s for s, cpu, _ in counted),
            "ratio_to_eager": statistics.median(
                a[0] / b[0] for a, b in zip(counted, timings["eager fp32"][1:], strict=True)
            ),
        }
    for process in processes:
        process.kill()
    return {
        "what": "HiTokSR full, 512x512 output, batch 1, float32 unless said",
        "threads": THREADS,
        "rounds": rounds,
        "rows": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of hitoksr full")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the plain export, about 1.4 GB")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.bundle, arguments.work, arguments.rounds), indent=1))
