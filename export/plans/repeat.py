"""The commands that repeat the compilation of a plan with NVIDIA's `trtexec` alone."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from tilewright.export.plans.profiles import Profile

__all__ = ["commands"]

FOLDER = "onnx"


def commands(root: Path, component: str, graph: Path, profiles: Sequence[Profile], level: int) -> tuple[str, ...]:
    """Write the weights into a folder, put the graph beside them, and compile it. `graph`: the one that failed."""
    write = ["tilewright", "export", "onnx", str(root), "-o", FOLDER, "--component", component]
    put = ["cp", str(graph), f"{FOLDER}/{component}.onnx"]
    run = ["trtexec", f"--onnx={FOLDER}/{component}.onnx", "--stronglyTyped", f"--builderOptimizationLevel={level}"]
    for number, profile in enumerate(profiles):
        run += [f"--profile={number}"] if len(profiles) > 1 else []
        for word, which in (("min", 0), ("opt", 1), ("max", 2)):
            shapes = ",".join(f"{name}:{'x'.join(map(str, shape[which]))}" for name, shape in profile.items())
            run.append(f"--{word}Shapes={shapes}")
    return shlex.join(write), shlex.join(put), shlex.join(run)
