"""Assembling a bundle from the results of stages: everything but packed weights, reports and the seal."""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import write
from tilewright.export.build.request import Request
from tilewright.export.build.stages.attach import read_weights
from tilewright.export.build.versions import TRACERS, version
from tilewright.export.targets import engine_folder, target_module
from tilewright.runtime.bundle.manifest import SCHEMA_VERSION, Component, EngineSpec, Manifest, Memory
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.weights import Weights

__all__ = ["Assembly", "engines"]


@dataclass(frozen=True)
class Assembly:
    """The directories of a request's finished stages."""

    request: Request
    attached: Path
    constants: Path
    optimised: Path

    def weights(self) -> Weights:
        """The weights that the bundle's graphs read, without those of the build and those that folding removed."""
        every, read = read_weights(self.attached), json.loads((self.optimised / "read.json").read_text())
        tensors = {name: {key: every.tensors[name][key] for key in keys} for name, keys in read.items() if keys}
        used = {r.folder for refs in tensors.values() for r in refs.values()}
        return Weights({name: folder for name, folder in every.folders.items() if name in used}, tensors)

    def assemble(self, root: Path, verified: str) -> Manifest:
        """Fill the folder, and return the manifest without writing it."""
        request = self.request
        root.mkdir(exist_ok=True)
        for name in request.components:
            shutil.copyfile(self.optimised / f"{name}.onnx", root / f"{name}.onnx")
        if (self.optimised / "engines").is_dir():
            shutil.copytree(self.optimised / "engines", root / "engines")
        weights = self.weights()
        write(root / "weights.json", to_json(weights))
        shutil.copytree(self.constants, root, dirs_exist_ok=True)
        write(root / "program.json", to_json(request.program))
        memory = json.loads((self.optimised / "memory.json").read_text())
        components = {
            name: Component(
                f"{name}.onnx",
                spec.inputs,
                spec.outputs,
                engines(root, name, request.engines, weights, partial(_memory, memory[name])),
                dict(spec.px),
            )
            for name, spec in request.components.items()
        }
        return Manifest(
            SCHEMA_VERSION,
            request.name,
            request.preset or "files",
            request.licence,
            components,
            {},
            {package: version(package) for package in (*TRACERS, "tilewright")},
            self._options() | {"verified": verified},
            constants="constants.safetensors" if (root / "constants.safetensors").is_file() else None,
            tokenizers=tuple(f"tokenizers/{file.name}" for file in sorted((root / "tokenizers").glob("*.json"))),
        )

    def _options(self) -> dict[str, str]:
        request, folders = self.request, self.weights().folders
        random = folders.keys() - request.used.keys() - {"merged"}
        but = f", but for {', '.join(sorted(folders.keys() - random))}" if folders.keys() - random else ""
        real = "stand-in, zeros" if request.stand_in else "given"
        return {
            "weights": f"random, seed {request.seed}{but}" if random else real,
            "packed": "yes" if all(folder.path is None for folder in folders.values()) else "no",
            "ops": request.ops,
            "settings": request.settings.to_json(),
        }


def _memory(of_targets: Mapping[str, Any], target: str) -> Memory:
    return Memory(**of_targets[target])


def engines(
    root: Path,
    component: str,
    pairs: Iterable[tuple[str, str]],
    weights: Weights,
    memory: Callable[[str], Memory],
) -> tuple[EngineSpec, ...]:
    """The engines of pairs of a target and a precision. They share the portable graph if the target changed nothing."""
    parameters = sum(math.prod(r.shape) for r in weights.tensors.get(component, {}).values())
    specs = []
    for target, precision in pairs:
        graph = f"{engine_folder(component, target)}/model.onnx"
        graph = graph if (root / graph).is_file() else f"{component}.onnx"
        specs.append(target_module(target).spec(precision, graph, memory(target), parameters))
    exact = [spec for spec in specs if spec.precision == "float32"]
    # without weights, another precision would lose digits and gain no time
    return tuple(exact if exact and not parameters else specs)
