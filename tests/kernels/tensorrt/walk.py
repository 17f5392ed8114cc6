"""Lead plugins through TensorRT's own Python code, as its builder would; questions and answers are JSON files.

Runs in a process of its own, with real bindings over libraries that can do nothing (stub.cpp). What the builder
supplies is played here: expressions of dimensions, descriptions of tensors, and the objects that take the result.
"""

import json
import operator
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tensorrt as trt
from tensorrt.plugin import _lib

from tilewright.kernels import tensorrt as plugins
from tilewright.kernels.ahead import Compiled
from tilewright.kernels.forms import PLUGINS

TYPES = {"fp16": trt.float16, "bf16": trt.bfloat16, "fp32": trt.float32, "fp8": trt.fp8, "int32": trt.int32}
WORDS = {dtype: word for word, dtype in TYPES.items()}
FIELDS = {np.dtype(np.int32): trt.PluginFieldType.INT32, np.dtype(np.float32): trt.PluginFieldType.FLOAT32}
D = trt.DimensionOperation
OPERATIONS = {D.SUM: operator.add, D.SUB: operator.sub, D.PROD: operator.mul, D.FLOOR_DIV: operator.floordiv}


class Expression(trt.IDimensionExpr):
    """A function of the sizes of named dimensions; the bindings let nobody make one, so `expression` goes around."""

    def is_constant(self):
        return self.constant

    def get_constant_value(self):
        return self.at({})


def expression(at, constant):
    made = Expression.__new__(Expression)
    made.at, made.constant = at, constant
    return made


class Builder(trt.IExprBuilder):
    """Makes expressions of expressions."""

    def constant(self, value):
        return expression(lambda sizes: value, constant=True)

    def operation(self, operation, first, second):
        def at(sizes):
            value = OPERATIONS[operation](first.at(sizes), second.at(sizes))
            assert value >= 0, "negative on the way"
            return value

        return expression(at, first.constant and second.constant)


class Setter(dict):
    """Takes the sizes that the kernel is passed."""


def dimension(size):
    return expression(lambda sizes: sizes.get(size, size), isinstance(size, int))


def described(dtype, shape):
    """A tensor as the builder describes it; a named dimension is dynamic."""
    desc = trt.DynamicPluginTensorDesc()
    desc.desc = trt.PluginTensorDesc()
    desc.desc.type, desc.desc.format = dtype, trt.TensorFormat.LINEAR
    desc.desc.dims = trt.Dims([size if isinstance(size, int) else -1 for size in shape])
    return desc


def created(case):
    """The plugin, from a node's attributes in the form in which the ONNX parser hands them over."""
    definition = _lib.QDP_REGISTRY[f"tilewright::{case['plugin']}"]
    assert definition.input_tensor_names == case["inputs"] and list(definition.input_attrs) == list(case["attributes"])
    values = {k: np.array([v], np.float32 if isinstance(v, float) else np.int32) for k, v in case["attributes"].items()}
    fields = trt.PluginFieldCollection([trt.PluginField(k, v, FIELDS[v.dtype]) for k, v in values.items()])
    creator = _lib._TemplatePluginCreator(
        case["plugin"], "tilewright", {k: (False, v.dtype.type) for k, v in values.items()}
    )
    request = trt.QuickPluginCreationRequest.PREFER_AOT
    return creator.create_plugin(case["plugin"], "tilewright", fields, trt.TensorRTPhase.BUILD, request)


def walk(case):
    plugin, builder = created(case), Builder()
    types, shapes = [TYPES[word] for word in case["types"]], case["shapes"]
    out_types = plugin.get_output_data_types(types, [len(shape) for shape in shapes])
    plugin.get_output_shapes([[dimension(size) for size in shape] for shape in shapes], [], builder)
    out_shapes = [[size._expr for size in desc.shape_expr] for desc in plugin.output_descs]
    ins = [described(dtype, shape) for dtype, shape in zip(types, shapes, strict=True)]
    outs = [described(dtype, ["?"] * len(shape)) for dtype, shape in zip(out_types, out_shapes, strict=True)]

    combinations = plugin.get_supported_format_combinations([*ins, *outs], len(ins))
    assert all(one.format == trt.TensorFormat.LINEAR for one in combinations)
    taken = [one.type for one in combinations]
    rows = [taken[i : i + len(ins) + len(outs)] for i in range(0, len(taken), len(ins) + len(outs))]

    plugin.configure_plugin(ins, outs)
    plugin.set_tactic(0)
    params, setter, made, kernels = SimpleNamespace(), Setter(), [], []
    implementation, compiled = plugin.aot_impl_function, plugins.compiled
    plugin.aot_impl_function = lambda *a: made.append(implementation(*a)) or made[0]
    plugins.compiled = lambda *a, **k: kernels.append(compiled(*a, **k)) or kernels[0]
    plugin.get_launch_params([], [*ins, *outs], len(ins), params, setter, builder)
    plugins.compiled = compiled
    name, ptx = plugin.get_kernel([one.desc for one in ins], [one.desc for one in outs])
    _, _, launch, extra = made[0]
    assert setter.nbSymExprs == len(setter) == len(extra)

    def at(sizes):
        return {
            "outputs": [[size.at(sizes) for size in shape] for shape in out_shapes],
            "sizes": [size._expr.at(sizes) for size in extra],
            **{word: getattr(launch, word)._expr.at(sizes) for word in vars(params)},
        }

    return {
        "name": name,
        "ptx": ptx.decode(),
        "types": [WORDS[dtype] for dtype in out_types],
        "combinations": [[WORDS[dtype] for dtype in row] for row in rows],
        "compiled": {"name": kernels[0].name, "threads": kernels[0].threads, "shared": kernels[0].shared},
        "at": [at(sizes) for sizes in case["at"]],
    }


def answer(question):
    try:
        if "parameters" in question:
            return plugins.ptx_of(
                Compiled("_k_kernel", 90, tuple(question["parameters"]), 32, 0, {"ptx": question["ptx"]})
            )
        plugins.register(question["arch"])
        return walk(question)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


asked, answers = map(Path, sys.argv[1:])
everything = [answer(question) for question in json.loads(asked.read_text())]
answers.write_text(json.dumps({"version": trt.__version__, "plugins": PLUGINS, "answers": everything}))
