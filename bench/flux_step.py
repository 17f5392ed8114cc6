"""One step of FLUX.1-Fill, 1 + 2 blocks at full width: engines, some in both memory modes, against eager diffusers.

Every contender has its own process, and they take turns. Prints JSON; `bench/run.py` stores it.
"""

import argparse
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

THREADS = 2
ROUNDS = 5


def inputs(bundle: Path, side: int) -> dict[str, Any]:
    """Seeded inputs of a step for a square picture, with the modulation of its sigma."""
    from tilewright.runtime.bundle.read import read_bundle

    random, opened = np.random.Generator(np.random.Philox(key=0)), read_bundle(bundle)
    sizes = {"h": side // 8, "w": side // 8}  # all others are 1
    specs = opened.manifest.components["step"].inputs
    arrays = {
        name: random.standard_normal([d if isinstance(d, int) else sizes.get(d, 1) for d in spec.shape], np.float32)
        for name, spec in specs.items()
    }
    sigma = np.array([0.7], np.float32)
    asked = {"pooled": np.zeros((1, 768), np.float32), "guidance": np.array([30], np.float32), "sigmas": sigma[None]}
    modulate = opened_engine(opened, "modulate", "ort-float32", "low")
    modulation = modulate.run(asked, ["modulation"])["modulation"][:, 0]
    modulate.close()
    return arrays | {"modulation": modulation, "sigma": sigma, "sigma_next": np.array([0.6], np.float32)}


def opened_engine(opened: Any, component: str, name: str, memory: str) -> Any:
    from tilewright.runtime.engines import Opening, backend

    spec = next(spec for spec in opened.manifest.components[component].engines if spec.name == name)
    return backend(spec.backend).open_engine(opened, component, spec, Opening(memory, THREADS))


def engine(name: str, memory: str) -> Callable[[Path, int], Callable[[], Any]]:
    def ready(bundle: Path, side: int) -> Callable[[], Any]:
        from tilewright.runtime.bundle.read import read_bundle

        feed = inputs(bundle, side)
        step = opened_engine(read_bundle(bundle), "step", name, memory)
        return lambda: step.run(feed, ["z_next"])["z_next"]

    return ready


def eager(bundle: Path, side: int) -> Callable[[], Any]:
    """The published class as its pipeline calls it: all 384 channels, modulation computed from sigma and text."""
    import torch
    from diffusers import FluxTransformer2DModel
    from safetensors.torch import load_file

    from tilewright.export.systems.flux.sizes import PRESETS

    torch.set_num_threads(THREADS)
    with torch.device("meta"):
        network = FluxTransformer2DModel(**PRESETS["mid"].transformer).eval()
    weights = load_file(bundle / "weights" / "transformer" / "transformer.safetensors")
    network.load_state_dict(weights, strict=True, assign=True)
    feed = {name: torch.from_numpy(array) for name, array in inputs(bundle, side).items()}
    rows = columns = side // 16

    def packed(latent: Any) -> Any:
        return torch.nn.functional.pixel_unshuffle(latent, 2).flatten(2).transpose(1, 2)

    words = torch.cat((feed["context"], feed["seen"]), 1)
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1], ids[..., 2] = torch.arange(rows)[:, None], torch.arange(columns)

    def run() -> Any:
        with torch.inference_mode():
            tokens = torch.cat((packed(feed["z"]), packed(feed["y"]), torch.zeros(1, rows * columns, 256)), 2)
            v = network(
                hidden_states=tokens,
                encoder_hidden_states=words,
                pooled_projections=torch.zeros(1, 768),
                timestep=feed["sigma"],
                guidance=torch.tensor([30.0]),
                img_ids=ids.reshape(-1, 3),
                txt_ids=torch.zeros(words.shape[1], 3),
            ).sample
            v = torch.nn.functional.pixel_shuffle(v.transpose(1, 2).unflatten(2, (rows, columns)), 2)
            return (feed["z"] + (feed["sigma_next"] - feed["sigma"]) * v).numpy()

    return run


PEER = "diffusers eager fp32"
CONTENDERS = {
    "tilewright fast": engine("ort-float32", "fast"),
    "tilewright low": engine("ort-float32", "low"),
    "openvino-float32": engine("openvino-float32", "fast"),
    "openvino-bfloat16": engine("openvino-bfloat16", "fast"),
    "openvino-bfloat16 low": engine("openvino-bfloat16", "low"),
    PEER: eager,
}


def contend(name: str, bundle: Path, side: int, pipe: Connection) -> None:
    run = CONTENDERS[name](bundle, side)
    pipe.send(None)
    while pipe.recv():
        peak = Peak()
        start = time.perf_counter()
        latent = run()
        pipe.send((time.perf_counter() - start, latent, peak.stop()))


class Peak:
    """The most memory that this process has of its own, without mapped files, looked at 50 times a second."""

    def __init__(self) -> None:
        self.most, self.ended = 0, threading.Event()
        self.thread = threading.Thread(target=self._look)
        self.thread.start()

    def _look(self) -> None:
        while not self.ended.wait(0.02):
            lines = Path("/proc/self/status").read_text().splitlines()
            anonymous = 1024 * int(next(line for line in lines if line.startswith("RssAnon:")).split()[1])
            self.most = max(self.most, anonymous)

    def stop(self) -> int:
        self.ended.set()
        self.thread.join()
        return self.most


def measure(bundle: Path, side: int, rounds: int, names: list[str]) -> dict[str, Any]:
    start = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    processes = []
    for name in names:
        pipes[name], theirs = start.Pipe()
        processes.append(start.Process(target=contend, args=(name, bundle, side, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        pipes[name].recv()
    timings: dict[str, list[tuple[float, Any, int]]] = {name: [] for name in names}
    for _ in range(rounds + 1):
        for name, pipe in pipes.items():
            pipe.send(True)
            timings[name].append(pipe.recv())
            print(name, timings[name][-1][0], file=sys.stderr, flush=True)
    for process in processes:
        process.kill()
    latent = timings[PEER][-1][1]
    rows = {
        name: {
            "median_s": statistics.median(s for s, *_ in runs[1:]),
            "ratio_to_eager": statistics.median(a[0] / b[0] for a, b in zip(runs[1:], timings[PEER][1:], strict=True)),
            "peak_anonymous_bytes": max(peak for *_, peak in runs[1:]),
            "relative_l2": float(np.linalg.norm(runs[-1][1] - latent) / np.linalg.norm(latent)),
        }
        for name, runs in timings.items()
    }
    return {
        "what": f"one step, 1 + 2 blocks of full width, {side}x{side} px, 1241 text tokens, random weights",
        "threads": THREADS,
        "rounds": rounds,
        "rows": rows,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="a bundle of in-token, preset mid, random weights")
    parser.add_argument("--side", type=int, default=512, help="of the picture, in pixels")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument(
        "--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help=f"{PEER} is needed"
    )
    arguments = parser.parse_args()
    print(json.dumps(measure(arguments.bundle, arguments.side, arguments.rounds, arguments.contenders), indent=1))
