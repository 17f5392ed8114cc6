"""verify: the comparison of engines with eager PyTorch."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from tilewright.export.build.assembly import Assembly
from tilewright.export.build.cache import Stage, write
from tilewright.export.build.code import code
from tilewright.export.build.versions import versions
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.engines import ort

__all__ = ["REPORT", "stage"]

REPORT = "accuracy.json"


def stage(assembly: Assembly, before: Mapping[str, Stage]) -> Stage:
    """The stage; its inputs are everything that runs: graphs, weights, constants, program, engines."""
    inputs = {name: before[name].key for name in ("optimise", "constants")}
    native = ort.native_library()
    inputs["native kernels"] = sha256_of_file(native) if native and native.is_file() else "none"
    judged = ("tilewright.export.verify.engines", "tilewright.runtime.engines.ort")
    modules = {spec.module for spec in assembly.request.components.values()}
    inputs |= code(__name__, *judged, assembly.request.system.module, *modules) | versions("torch", "onnxruntime")
    return Stage("verify", inputs, lambda folder: _work(assembly, folder))


def _work(assembly: Assembly, directory: Path) -> None:
    from tilewright.export.verify.engines import require, verify

    trial = directory / "bundle"
    trial.mkdir()
    manifest, weights = assembly.assemble(trial, "being verified"), assembly.weights()
    packed = assembly.attached / "weights"
    folders = {n: f if f.path else replace(f, path=str((packed / n).absolute())) for n, f in weights.folders.items()}
    write(
        trial / "weights.json", to_json(replace(weights, folders=folders))
    )  # weights that the build wrote are still in the cache
    write_manifest(trial, manifest)
    report = verify(trial, fresh=False)
    shutil.rmtree(trial)
    write(directory / REPORT, json.dumps(report, indent=2, sort_keys=True) + "\n")
    require(report)
