"""The compiled package of a component: made once for a network, the types of its weights and this machine, and kept."""

import json
import math
import shutil
import time
from functools import partial
from pathlib import Path

from tilewright.export.build.cache import Stage, filling, write
from tilewright.export.build.code import code
from tilewright.export.system import Settings
from tilewright.export.systems import system
from tilewright.export.targets import TARGETS, engine_folder
from tilewright.export.targets.aoti import architecture, compile_network, file, machine, spec
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.engines.trust import trust
from tilewright.runtime.errors import BuildError, TilewrightError

__all__ = ["compile_package"]

NOTED = "noted.json"


def compile_package(bundle: Bundle, name: str, precision: str, folder: Path) -> EngineSpec:
    """Put the package of a component into a bundle's folder; returns its engine."""
    settings = Settings.from_json(bundle.manifest.options["settings"])
    network = system(bundle.manifest.system).components(settings)[name]
    references = bundle.weights.tensors.get(name, {})
    parameters = sum(math.prod(r.shape) for r in references.values())
    stored = {weight: r.dtype for weight, r in references.items()}
    inputs = {"recipe": network.recipe, "precision": precision, "stored": str(sorted(stored.items()))} | machine()
    inputs |= code(__name__, TARGETS["aoti"], "tilewright.export.graph.trace", network.module)
    stage = Stage("package", inputs, partial(compile_network, network, stored, precision, what=name))
    with filling(stage.directory) as new:
        if new:
            try:
                start = time.perf_counter()
                stage.work(new)
                note = {
                    "architecture": architecture(),
                    "parameters": parameters,
                    "seconds": time.perf_counter() - start,
                }
                write(new / NOTED, json.dumps(note))
            except TilewrightError:
                raise
            except Exception as error:  # torch.export raises errors of any type
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                raise BuildError(f"target 'aoti' cannot trace {name} ({reason}); see --verbose") from error
    place = f"{engine_folder(name, 'aoti')}/{file(precision)}"
    for source in stage.directory.glob(f"{precision}.*"):
        target = (folder / place).with_name(source.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # it may be another name of the old bundle's file
        shutil.copyfile(source, target)
    trust(folder / place)
    return spec(precision, place, bundle.manifest.components[name].engines[0].memory, 0)
