"""The cost of writing a recipe's engines in 8 bits: seconds, peak memory, bytes that each network's engine reads.

BUNDLE may be of a size that no CPU restores a picture with: statistics of random numbers stand for those of pictures,
because no cost depends on them. The engines go into a copy of the bundle. Prints JSON.
"""

import argparse
import json
import multiprocessing
import resource
import shutil
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tilewright.calib import add_engines, make_recipe
from tilewright.calib.networks import networks_digest
from tilewright.calib.observe.observers import Observations
from tilewright.calib.observe.pieces import observed_tensors
from tilewright.export.build.compile import link
from tilewright.runtime.bundle.read import Bundle, read_bundle


def random_statistics(bundle: Bundle) -> Observations:
    """Each tensor that a collection would observe, seen once with a few numbers."""
    random, observed = np.random.Generator(np.random.Philox(key=0)), Observations()
    for name, component in bundle.manifest.components.items():
        graph = onnx.load(bundle.path(component.graph), load_external_data=False).graph
        for tensor in observed_tensors(graph):
            observed.add(f"{name}/{tensor}", 0, random.standard_normal(4096, np.float32))
    return observed


def write(root: Path, precision: str, targets: tuple[str, ...], pipe: Connection) -> None:
    bundle, start = read_bundle(root), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    recipe = make_recipe(bundle, random_statistics(bundle), {"networks": networks_digest(bundle)}, precision)
    added = add_engines(root, recipe, targets)
    used = resource.getrusage(resource.RUSAGE_SELF)
    references = bundle.weights.tensors
    floats = {c: sum(r.length for r in references.get(c, {}).values()) for c in bundle.manifest.components}
    pipe.send(
        {
            "layers": len(recipe.layers),
            "layers_in_8_bits": len(recipe.quantised),
            "wall_seconds": time.perf_counter() - start,
            "cpu_seconds": used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime,
            "peak_rss_bytes": used.ru_maxrss * 1024,  # with the pages of mapped files
            "float_bytes": floats,  # that each component's engines in float read
            "bytes": added.bytes,  # that each engine in 8 bits reads, some of them from the files in float
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="fp8")
    parser.add_argument("--target", default="ort")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.bundle.resolve().parent) as temporary:
        root = Path(temporary) / "bundle"
        shutil.copytree(arguments.bundle, root, copy_function=link)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        words = (root, arguments.precision, tuple(arguments.target.split(",")), theirs)
        process: Any = multiprocessing.get_context("spawn").Process(target=write, args=words)
        process.start()
        theirs.close()
        result = ours.recv()
        process.join()
        result["file_bytes"] = sum(f.stat().st_size for f in (root / "weights" / arguments.precision).iterdir())
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
