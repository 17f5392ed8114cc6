"""optimise: graphs folded and rewritten for each target, with references to the weights; their working memory."""

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tilewright.export.build.cache import Stage, write
from tilewright.export.build.code import code
from tilewright.export.build.request import Request
from tilewright.export.build.stages.attach import read_weights
from tilewright.export.build.versions import versions
from tilewright.export.system import ComponentSpec, part_of
from tilewright.export.targets import TARGETS, engine_folder, target_module
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.bundle.weights import Reference, location

__all__ = ["stage"]

STORED = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32"}


def stage(request: Request, traced: Stage, attached: Stage) -> Stage:
    """The stage; its inputs are graphs, weights, and the code of rewrites and targets."""
    inputs = {"trace": traced.key, "attach": attached.key, "ops": request.ops}
    inputs |= {"targets": ",".join(request.targets)}
    inputs |= code(__name__, *(TARGETS[target] for target in request.targets)) | versions(
        "onnxscript", "onnx-ir", "onnx"
    )
    return Stage("optimise", inputs, lambda folder: _work(request, traced.directory, attached.directory, folder))


def _work(request: Request, traced: Path, attached: Path, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.graph.footprint import footprint
    from tilewright.export.graph.ops import inline
    from tilewright.export.graph.rewrites.cast import cast
    from tilewright.export.graph.rewrites.forget_shapes import forget_shapes
    from tilewright.export.graph.tidy import tidy

    weights = read_weights(attached)
    memory: dict[str, dict[str, Any]] = {}
    read = {}
    for name, spec in request.components.items():
        model = ir.load(traced / f"{name}.onnx")
        tidy(model)
        if request.ops == "standard":
            inline(model)
            tidy(model)
        read[name] = _refer(model, weights.tensors.get(name, {}))
        cast(model)
        for target in request.targets:
            copy = model.clone()
            changed = target_module(target).prepare(copy)
            memory.setdefault(name, {})[target] = footprint(copy, partial(_sizes, spec))
            if changed:
                engine = directory / engine_folder(name, target) / "model.onnx"
                engine.parent.mkdir(parents=True)
                ir.save(copy, engine)
        forget_shapes(model)
        ir.save(model, directory / f"{name}.onnx")
    write(directory / "memory.json", json.dumps(encode(memory), indent=1, sort_keys=True))
    write(directory / "read.json", json.dumps(read, indent=1, sort_keys=True))


def _refer(model: Any, references: Mapping[str, Reference]) -> list[str]:
    """Let the graph's weights refer to their bytes; returns their names, as folding may have removed some."""
    import onnx_ir as ir

    read = sorted(references.keys() & model.graph.initializers.keys())
    for name in read:
        r = references[name]
        dtype, shape = STORED[r.dtype], ir.Shape(r.shape)
        value = ir.ExternalTensor(location(r), r.offset, r.length, ir.DataType[dtype], shape=shape, name=name)
        model.graph.initializers[name].const_value = value
    return read


def _sizes(spec: ComponentSpec, side: int) -> dict[str, int]:
    """The free sizes of a component for a square with this side in output pixels."""
    tensors = (*spec.inputs.values(), *spec.outputs.values())
    named = {d for tensor in tensors for d in tensor.shape if isinstance(d, str)}
    wholes = {whole: side // spec.px[whole] if whole in spec.px else 1 for whole, _ in map(part_of, named)}
    sizes = {name: wholes[part_of(name)[0]] // part_of(name)[1] for name in named}
    return sizes | {f"{name}_units": wholes[name] // multiple for name, multiple in spec.multiples.items()}
