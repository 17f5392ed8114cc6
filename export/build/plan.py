"""The plan of a component: compiled once for a graph, a GPU and the options, and kept in the cache of builds."""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.export.build.cache import Stage, filling, write
from tilewright.export.build.code import code
from tilewright.export.plans.build import Options, build_plan
from tilewright.export.plans.profiles import Profile, profiles, sides_of
from tilewright.export.plans.repeat import commands
from tilewright.export.plans.timing import Card, default_place, read_timings, write_timings
from tilewright.export.targets import engine_folder
from tilewright.export.targets.tensorrt import prepare, spec, typed
from tilewright.kernels.face import DOMAIN
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, writing
from tilewright.runtime.bundle.external_data import external_data, relocated
from tilewright.runtime.bundle.manifest import EngineSpec, Needs, Range
from tilewright.runtime.bundle.manifest import Profile as Sizes
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.errors import EnvironmentMismatch, TilewrightError

__all__ = ["compile_graph", "compile_plan", "this_card"]

OLDEST = {"float32": (7, 5), "bfloat16": (8, 0), "int8": (8, 0), "fp8": (8, 9)}  # compute capability
LOG = logging.getLogger("tilewright")
INSPECTED = "inspected.json"


def this_card() -> Card:
    """The GPU and the TensorRT of this machine."""
    import tensorrt

    from tilewright.runtime.engines.driver import first_gpu
    from tilewright.runtime.engines.machine import compute_capability

    return Card(first_gpu().name, compute_capability() or (0, 0), tensorrt.__version__)


def compile_plan(bundle: Bundle, name: str, precision: str, card: Card, options: Options, folder: Path) -> EngineSpec:
    """Put the plan of a component in a float precision into a bundle's folder; returns its engine."""
    import onnx_ir as ir

    model = ir.load(bundle.path(bundle.manifest.components[name].graph))
    typed(model, precision)
    prepare(model)
    return compile_graph(bundle, name, precision, model, bundle.files_of(name), card, options, folder)


def compile_graph(
    bundle: Bundle,
    name: str,
    precision: str,
    model: Any,
    files: Mapping[str, Path],
    card: Card,
    options: Options,
    folder: Path,
) -> EngineSpec:
    """Put a graph of a component, and its plan, into a bundle's folder; returns its engine.

    `files`: path of weights in the graph -> real path.
    """
    import onnx_ir as ir

    if card.capability < OLDEST[precision]:
        least = "{}.{}".format(*OLDEST[precision])
        raise EnvironmentMismatch(f"{precision} needs a GPU of compute capability {least}, and here is {card}")
    component = bundle.manifest.components[name]
    sides = sides_of(bundle.program, name, options.tiles)
    batches = options.batches or (max((p.tiles.batch for p in bundle.program.passes if p.tiles), default=1),)
    shapes = profiles(component, sides, bundle.program.multiple_px, batches)
    graph = ir.to_proto(model).SerializeToString()
    stage = _stage(bundle, name, precision, graph, files, shapes, card, options)
    with filling(stage.directory) as new:
        if new:
            stage.work(new)
    place = f"{engine_folder(name, 'tensorrt')}/{precision}"
    plan, onnx = f"{place}.{card.architecture}.plan", f"{place}.onnx"
    for file, data in ((plan, (stage.directory / "plan").read_bytes()), (onnx, graph)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).unlink(missing_ok=True)  # it may be another name of the old bundle's file
        (folder / file).write_bytes(data)
    report = folder / "reports" / f"tensorrt.{name}.{precision}.{card.architecture}.json"
    report.unlink(missing_ok=True)
    write(report, (stage.directory / INSPECTED).read_text())
    base = spec(precision, plan, component.engines[0].memory, 0)
    return replace(
        base,
        name=f"{base.name}-{card.architecture}",
        files=(plan, onnx),
        needs=Needs((), card.capability, {"tensorrt": card.tensorrt}, exactly=True),
        profile=Sizes(Range(1, max(batches)), Range(1, max(sides)) if sides else Sizes().side_px),
    )


def _stage(
    bundle: Bundle,
    name: str,
    precision: str,
    graph: bytes,
    files: Mapping[str, Path],
    shapes: list[Profile],
    card: Card,
    options: Options,
) -> Stage:
    """The compilation; its inputs are all that decides a plan. The values of weights do not."""
    external = external_data(graph, name)
    anywhere = relocated(graph, {weight: ("weights", 0, e.length) for weight, e in external.items()})
    chosen = asdict(options) | {"timings": None, "tiles": None, "batches": None}
    inputs = {"graph": sha256_of_bytes(anywhere), "card": str(card), "profiles": json.dumps(shapes)}
    inputs |= {"options": json.dumps(chosen), "precision": precision} | code("tilewright.export.plans.build")

    def work(folder: Path) -> None:
        maps = {file: np.memmap(file, np.uint8, mode="r") for file in set(files.values())}
        weights: dict[str, Any] = {
            weight: maps[files[e.location]][e.offset : e.offset + e.length] for weight, e in external.items()
        }
        if DOMAIN.encode() in graph:  # it takes seconds to load them
            _register_plugins(card)
        timings = options.timings or default_place(card)
        start = time.perf_counter()
        try:
            built = build_plan(
                graph, weights, shapes, options, read_timings(timings, card), what=f"{bundle.root}: {name} {precision}"
            )
        except TilewrightError as error:
            if not error.repeat:
                error.repeat = commands(bundle.root, name, _kept(graph, name, precision), shapes, options.level)
            raise
        write_timings(timings, card, built.timings)
        (folder / "plan").write_bytes(built.plan)
        note = built.inspected.to_json() | {"device_memory": built.memory, "architecture": card.architecture}
        note |= {"parameters": sum(math.prod(e.shape) for e in external.values())}
        write(folder / INSPECTED, json.dumps(note | {"seconds": time.perf_counter() - start}, indent=1))

    return Stage("plan", inputs, work)


def _register_plugins(card: Card) -> None:
    """Make our plugins known, for this GPU. They need PyTorch and Triton; without, our nodes run as their functions."""
    try:
        from tilewright.kernels.tensorrt import register
    except ImportError as error:
        LOG.warning("our kernels are not in the plan, standard operators are: %s", error)
        return
    register(10 * card.capability[0] + card.capability[1])


def _kept(graph: bytes, name: str, precision: str) -> Path:
    """The file of a graph that failed, for the command that repeats it."""
    file = cache_dir() / "tensorrt" / "failed" / f"{name}.{precision}.onnx"
    file.parent.mkdir(parents=True, exist_ok=True)
    with writing(file) as temporary:
        temporary.write_bytes(graph)
    return file
