"""A component's network to an ONNX graph: the only caller of torch.export and torch.onnx.

Weights never exist: parameters are made on the meta device and faked, and leave as references with a name, a type, a
shape and no bytes. Buffers that the network computes for itself (frequencies, means) are real and stay in the graph.
"""

import contextlib
import gc
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from tilewright.export.graph.exporter import quicker
from tilewright.export.graph.ops import attach, translations
from tilewright.export.system import ComponentSpec, part_of
from tilewright.runtime.bundle.program import TensorSpec

__all__ = ["OPSET", "UNRESOLVED", "network_on_meta", "parameter_specs", "trace"]

OPSET = 23  # the first with Attention and RMSNormalization, which every target fuses
BATCH = 31  # tiles in a call, at most; with guidance they count twice, and upstream classes treat 64 in another way
UNRESOLVED = "unresolved"  # the file of a weight that is not attached yet
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}
INITIALISERS = ("torch.nn.init", "transformers.initialization")  # the second stands in for the first at times


class _ParametersOnMeta(TorchFunctionMode):
    """Factories that make parameters give meta tensors; those that compute (arange, tensor, ...) stay real.

    What would fill a meta tensor is left out: it fills nothing, and takes half of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) in INITIALISERS:
            filled = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(filled, torch.Tensor) and filled.is_meta:
                return filled
        if func in FACTORIES:
            return func(*args, **((kwargs or {}) | {"device": "meta"}))
        return func(*args, **(kwargs or {}))


def network_on_meta(source: ComponentSpec) -> nn.Module:
    """The component's network in evaluation mode, its parameters without storage."""
    with _ParametersOnMeta():
        return source.build().eval()


def parameter_specs(source: ComponentSpec) -> dict[str, TensorSpec]:
    """The names and shapes of a component's parameters."""
    named = network_on_meta(source).named_parameters()
    return {name: TensorSpec("float32", tuple(parameter.shape)) for name, parameter in named}


def trace(source: ComponentSpec) -> ir.Model:
    """The component's graph, our ops one node each; every parameter is an unresolved external tensor."""
    with _rarely_collected(), quicker():
        return _traced(source)


def _traced(source: ComponentSpec) -> ir.Model:
    network = network_on_meta(source)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(network, fake)
    with fake:
        arguments = {name: _example(source, spec) for name, spec in source.inputs.items()}
    with torch.no_grad(), _quiet():
        with fake:
            exported = torch.export.export(network, (), arguments, dynamic_shapes=_dynamic(source), strict=False)
        # the exporter's own way traces the whole graph twice more, for the few nodes that it has no translation of
        exported.run_decompositions = partial(_decomposed, exported)  # type: ignore[method-assign]
        program = torch.onnx.export(
            exported,
            input_names=list(source.inputs),
            output_names=list(source.outputs),
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=translations(),
            verbose=False,
        )
    assert program is not None
    model = program.model
    RemoveUnusedNodesPass()(model)
    attach(model)
    _name_sizes(model, source)
    _unresolve(model, {name for name, _ in network.named_parameters()})
    _slim(model)
    return model


def _decomposed(exported: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """The program with every node that `table` knows, or that may give a view of its input, in simpler nodes."""
    graph = exported.graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    ops = [node.target for node in called if isinstance(node.target, torch._ops.OpOverload)]
    nested = len(list(exported.graph_module.modules())) > 1
    if nested or any(op._schema.is_mutable for op in ops):  # what happens in place needs the whole
        return ExportedProgram.run_decompositions(exported, dict(table))
    sizes: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        elif node.target in table or _may_view(node.target):
            made = _inlined(node, table, sizes)
            for spec in exported.graph_signature.output_specs:
                if spec.arg.name == node.name:
                    spec.arg.name = made.name
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _may_view(op: Any) -> bool:
    """Whether an op is made of others and gives its input, or a view of it, in some cases."""
    if not isinstance(op, torch._ops.OpOverload) or op is torch.ops.aten.reshape.default:  # which ONNX has as it is
        return False
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    views = any(returned.alias_info for returned in op._schema.returns)
    return composite and (views or torch.Tag.maybe_aliasing_or_mutating in op.tags)


def _inlined(node: fx.Node, table: Mapping[Any, Callable[..., Any]], sizes: dict[Any, fx.Node]) -> Any:
    """The node that takes a node's place, at the end of those that its decomposition consists of."""
    given, op = node.all_input_nodes, cast(Any, node.target)

    def call(*values: Any) -> Any:
        now = dict(zip(given, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), now.__getitem__)
        return op(*args, **kwargs)

    values = [n.meta["val"] for n in given]
    fake = next(v.fake_mode for v in [*values, node.meta["val"]] if isinstance(v, FakeTensor))
    with fake:
        parts = make_fx(call, decomposition_table=dict(table))(*values)
    now = dict(zip((n for n in parts.graph.nodes if n.op == "placeholder"), given, strict=True))
    for part in parts.graph.nodes:
        value = part.meta.get("val")
        if part.op == "output":
            result = fx.map_arg(part.args[0], now.__getitem__)
        elif isinstance(value, torch.SymInt) and value.node.expr in sizes:
            now[part] = sizes[value.node.expr]
        elif part.op != "placeholder":
            if part.target is torch.ops.aten.sym_numel.default and part.args[0].meta["val"].ndim == 1:
                part.target, part.args = torch.ops.aten.sym_size.int, (part.args[0], 0)  # which the exporter knows
            with node.graph.inserting_before(node):
                now[part] = node.graph.node_copy(part, now.__getitem__)
            now[part].meta = node.meta | {"val": value}
            if isinstance(value, torch.SymInt):
                sizes[value.node.expr] = now[part]
    if isinstance(result, fx.Node):
        node.replace_all_uses_with(result)
    else:
        for user in list(node.users):  # getitem
            user.replace_all_uses_with(result[user.args[1]])
            node.graph.erase_node(user)
    node.graph.erase_node(node)
    return result


def _fake_parameters(network: nn.Module, fake: FakeTensorMode) -> None:
    with fake:
        for module in network.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                    module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _sizes(source: ComponentSpec) -> list[str]:
    """The free sizes of the inputs, in order; `h/2` is no other than `h`."""
    named = (d for spec in source.inputs.values() for d in spec.shape if isinstance(d, str))
    return list(dict.fromkeys(part_of(d)[0] for d in named))


def _example(source: ComponentSpec, spec: TensorSpec) -> torch.Tensor:
    # different sizes for different names, and none of 1, so that no two are taken for the same or for a constant
    chosen = {name: (2 + i) * source.multiples.get(name, 1) for i, name in enumerate(_sizes(source))}
    parts = [(d, 1) if isinstance(d, int) else part_of(d) for d in spec.shape]
    shape = [(d if isinstance(d, int) else chosen[d]) // part for d, part in parts]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _dynamic(source: ComponentSpec) -> dict[str, dict[int, Any]]:
    most = {"batch": BATCH}
    units = {n: torch.export.Dim(f"{n}_units", min=1, max=most.get(n, 4096)) for n in _sizes(source)}

    def free(named: str) -> Any:
        name, part = part_of(named)
        multiple = source.multiples.get(name, 1) // part
        return units[name] if multiple == 1 else multiple * units[name]

    return {
        name: {axis: free(d) for axis, d in enumerate(spec.shape) if isinstance(d, str)}
        for name, spec in source.inputs.items()
    }


def _name_sizes(model: ir.Model, source: ComponentSpec) -> None:
    """Our names for the exporter's symbols, in every shape: `height_units` counts multiples, `batch` counts ones."""
    renamed: dict[str, str] = {}
    inputs: Any = model.graph.inputs
    for value in inputs:
        for dim, name in zip(value.shape, source.inputs[value.name].shape, strict=True):
            if isinstance(name, str):
                symbol = re.search(r"[a-z]\d+", str(dim.value))[0]  # type: ignore[index]
                whole = part_of(name)[0]
                renamed[symbol] = f"{whole}_units" if whole in source.multiples else whole
    pattern = re.compile(rf"\b({'|'.join(renamed)})\b")
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        if value.shape is not None:
            dims = [
                d if isinstance(d, int) else pattern.sub(lambda m: renamed[m[0]], str(d.value)) for d in value.shape
            ]
            value.shape = ir.Shape(dims)
    specs = source.inputs | source.outputs
    for value in [*model.graph.inputs, *model.graph.outputs]:
        value.shape = ir.Shape(specs[str(value.name)].shape)


def _unresolve(model: ir.Model, parameters: set[str]) -> None:
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        if name in parameters:
            value.const_value = ir.ExternalTensor(
                UNRESOLVED, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
            )


def _slim(model: ir.Model) -> None:
    """Drop stack traces and source lines, which outweigh the graph and differ between machines."""
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for output in node.outputs:
            output.metadata_props.clear()
    for value in [*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "tilewright", None


@contextlib.contextmanager
def _rarely_collected() -> Iterator[None]:
    """Tracing makes many objects that stay; looking through them for dead ones would take a sixth of its time."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's remarks on optional packages and its own internals are not for our users."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
