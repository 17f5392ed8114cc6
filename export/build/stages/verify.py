"""verify: the comparison of engines with eager PyTorch."""

import contextlib
import importlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from tilewright.export.build.assembly import Assembly
from tilewright.export.build.cache import Stage, write
from tilewright.export.build.code import code
from tilewright.export.build.versions import versions
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.engines import BACKENDS, ort
from tilewright.runtime.errors import TilewrightError

__all__ = ["REPORT", "stage"]

REPORT = "accuracy.json"
LOG = logging.getLogger("tilewright")


def stage(assembly: Assembly, before: Mapping[str, Stage]) -> Stage:
    """The stage; its inputs are everything that runs: graphs, weights, constants, program, engines."""
    inputs = {name: before[name].key for name in ("optimise", "constants")}
    native = ort.native_library()
    inputs["native kernels"] = sha256_of_file(native) if native and native.is_file() else "none"
    inputs["tiles"] = str((assembly.request.tiles, assembly.request.batches))
    inputs["precisions"] = ",".join(assembly.request.precisions)
    backends = [importlib.import_module(BACKENDS[target]) for target in assembly.request.targets]
    judged = ("tilewright.export.verify.engines", *(module.__name__ for module in backends))
    modules = {spec.module for spec in assembly.request.components.values()}
    inputs |= code(__name__, *judged, assembly.request.system.module, *modules)
    inputs |= versions("torch", *(package for module in backends for package in module.PACKAGES))
    return Stage("verify", inputs, lambda folder: _work(assembly, folder))


def _work(assembly: Assembly, directory: Path) -> None:
    from tilewright.export.verify.engines import verify
    from tilewright.export.verify.gate import require

    trial = directory / "bundle"
    trial.mkdir()
    manifest, weights = assembly.assemble(trial, "being verified"), assembly.weights()
    packed = assembly.attached / "weights"
    folders = {n: f if f.path else replace(f, path=str((packed / n).absolute())) for n, f in weights.folders.items()}
    write(
        trial / "weights.json", to_json(replace(weights, folders=folders))
    )  # weights that the build wrote are still in the cache
    write_manifest(trial, manifest)
    with _advising():
        report = verify(trial, fresh=False)
    shutil.rmtree(trial)
    write(directory / REPORT, json.dumps(report, indent=2, sort_keys=True) + "\n")
    for name, engine in report["engines"].items():
        if engine["fault"] and engine["precision"] != "float32":  # it stays in the bundle, and is not the default
            LOG.warning("%s: %s", name, engine["fault"])
    with _advising():
        require(report, ("float32",), trial)


@contextlib.contextmanager
def _advising() -> Iterator[None]:
    """Say how to get a bundle in spite of an error, because commands that repeat the error need one."""
    try:
        yield
    except TilewrightError as error:
        if not error.repeat:
            raise
        advice = "--verify never builds the bundle, and 'tilewright export verify' then says how to repeat this alone"
        raise type(error)(f"{error}; {advice}") from error
