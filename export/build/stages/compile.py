"""compile: engines of targets that make machine code of networks, once for each component and types of its weights."""

import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from tilewright.export.build.cache import Stage, filling
from tilewright.export.build.code import code
from tilewright.export.build.request import Request
from tilewright.export.build.stages.attach import read_weights
from tilewright.export.system import ComponentSpec
from tilewright.export.targets import TARGETS, engine_folder, target_module
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines.trust import trust
from tilewright.runtime.errors import BuildError, TilewrightError

__all__ = ["compile_into", "compiled_targets", "stage"]


def compiled_targets(targets: Mapping[str, None] | tuple[str, ...]) -> list[str]:
    """The targets that make machine code of networks."""
    return [target for target in targets if hasattr(target_module(target), "compile_component")]


def stage(request: Request, traced: Stage, attached: Stage) -> Stage:
    """The stage; its inputs are the networks, the types of their weights, the compiler and this machine."""
    inputs = {"trace": traced.key, "attach": attached.key, "engines": str(request.engines)}
    for target in compiled_targets(request.targets):
        inputs |= {f"{target} {name}": value for name, value in target_module(target).compiler().items()}
        inputs |= code(TARGETS[target])
    return Stage("compile", inputs | code(__name__), lambda folder: _work(request, attached.directory, folder))


def _work(request: Request, attached: Path, directory: Path) -> None:
    tensors = read_weights(attached).tensors
    for name, spec in request.components.items():
        for target, precision in request.engines:
            compile_into(directory, target, precision, name, spec, tensors.get(name, {}))


def compile_into(
    root: Path, target: str, precision: str, component: str, spec: ComponentSpec, weights: Mapping[str, Reference]
) -> None:
    """Put a component's compiled engine into the folder of a bundle, from the cache if it is there.

    A component without weights has no engine in another precision than float32.
    """
    if target not in compiled_targets((target,)) or (precision != "float32" and not weights):
        return
    package = _package(target, precision, spec, {name: r.dtype for name, r in weights.items()})
    with filling(package.directory) as folder:
        if folder:
            try:
                package.work(folder)
            except TilewrightError:
                raise
            except Exception as error:  # PyTorch and the compiler raise errors of any type
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BuildError(f"target {target!r} cannot compile {component} ({reason}); see --verbose") from error
    place = root / engine_folder(component, target)
    shutil.copytree(package.directory, place, dirs_exist_ok=True)
    trust(place / target_module(target).file(precision))


def _package(target: str, precision: str, spec: ComponentSpec, stored: Mapping[str, str]) -> Stage:
    """The compiled engine, which other builds with such weights share."""
    module = target_module(target)
    inputs = {"recipe": spec.recipe, "target": target, "precision": precision, "stored": str(sorted(stored.items()))}
    inputs |= module.compiler() | code(TARGETS[target], "tilewright.export.graph.trace", spec.module)
    return Stage("package", inputs, partial(module.compile_component, spec, stored, precision))
