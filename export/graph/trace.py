"""Tracing a component's network into an ONNX graph. Only this file calls torch.export and torch.onnx.

Weights are never allocated: parameters are fake tensors, and the graph refers to them by name, type and shape. Buffers
that the network computes (frequencies, means) are real and stay in the graph.
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
from tilewright.export.graph.ops import give_functions, translations
from tilewright.export.system import ComponentSpec, part_of
from tilewright.runtime.bundle.program import ANY, TensorSpec

__all__ = [
    "OPSET",
    "UNRESOLVED",
    "exported_program",
    "network_on_meta",
    "parameter_specs",
    "quiet",
    "sizes_of",
    "trace",
]

OPSET = 23  # the first opset with Attention and RMSNormalization, which every target fuses
MOST = {"batch": 31}  # the most tiles in a call; guidance doubles them, and the libraries' classes treat 64 differently
MOST_UNITS = 4096  # the most units of any other free size
UNRESOLVED = "unresolved"  # stands for the file of a weight until it is known
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}
INITIALISERS = ("torch.nn.init", "transformers.initialization")  # the second sometimes replaces the first


class _ParametersOnMeta(TorchFunctionMode):
    """Functions that allocate parameters give meta tensors; those that compute (arange, tensor, ...) stay real.

    Initialising a meta tensor is skipped: it has no effect and takes half of the time.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) in INITIALISERS:
            target = args[0] if args else (kwargs or {}).get("tensor")
            if isinstance(target, torch.Tensor) and target.is_meta:
                return target
        if func in FACTORIES:
            return func(*args, **((kwargs or {}) | {"device": "meta"}))
        return func(*args, **(kwargs or {}))


def network_on_meta(source: ComponentSpec) -> nn.Module:
    """The component's network in evaluation mode. Its parameters have no storage."""
    with _ParametersOnMeta():
        return source.build().eval()


def parameter_specs(source: ComponentSpec) -> dict[str, TensorSpec]:
    """The name, type and shape of each of a component's parameters."""
    named = network_on_meta(source).named_parameters()
    return {name: TensorSpec("float32", tuple(parameter.shape)) for name, parameter in named}


def trace(source: ComponentSpec) -> ir.Model:
    """The component's graph. Each of our ops is one node, and every parameter is an unresolved external tensor."""
    with _rarely_collected(), quicker():
        return _traced(source)


def _traced(source: ComponentSpec) -> ir.Model:
    network = network_on_meta(source)
    with torch.no_grad(), quiet("torch.onnx", "torch.export", "onnxscript"):
        exported = exported_program(source, network)
        # the exporter would trace the whole graph twice more, for the few nodes without a translation
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
    give_functions(model)
    _name_sizes(model, source)
    _unresolve(model, {name for name, _ in network.named_parameters()})
    _slim(model)
    return model


def exported_program(source: ComponentSpec, network: nn.Module) -> ExportedProgram:
    """The component's network as PyTorch exports it, with free sizes. Its parameters become fake tensors."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(network, fake)
    with torch.no_grad(), quiet("torch.onnx", "torch.export", "onnxscript"), fake:
        arguments = {name: _example(source, spec) for name, spec in source.inputs.items()}
        return torch.export.export(network, (), arguments, dynamic_shapes=_dynamic(source), strict=False)


def _decomposed(exported: ExportedProgram, table: Mapping[Any, Callable[..., Any]]) -> ExportedProgram:
    """The program with simpler nodes in the place of those in `table` and of those that may return views."""
    graph = exported.graph
    called = [node for node in graph.nodes if node.op == "call_function"]
    ops = [node.target for node in called if isinstance(node.target, torch._ops.OpOverload)]
    nested = len(list(exported.graph_module.modules())) > 1
    if nested or any(op._schema.is_mutable for op in ops):  # in-place changes cannot be replaced node by node
        return ExportedProgram.run_decompositions(exported, dict(table))
    sizes: dict[Any, fx.Node] = {}
    known: dict[Any, fx.Graph] = {}  # a network's blocks are alike, and a decomposition takes long
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            sizes.setdefault(value.node.expr, node)
        elif node.target in table or _may_view(node.target):
            replacement = _inlined(node, table, sizes, known)
            for spec in exported.graph_signature.output_specs:
                if spec.arg.name == node.name:
                    spec.arg.name = replacement.name
    graph.eliminate_dead_code()
    exported.graph_module.recompile()
    return exported


def _may_view(op: Any) -> bool:
    """Whether an op consists of other ops and sometimes returns its input or a view of it."""
    if not isinstance(op, torch._ops.OpOverload) or op is torch.ops.aten.reshape.default:  # ONNX has Reshape
        return False
    composite = op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    views = any(returned.alias_info for returned in op._schema.returns)
    return composite and (views or torch.Tag.maybe_aliasing_or_mutating in op.tags)


def _simpler(node: fx.Node, table: Mapping[Any, Callable[..., Any]]) -> fx.Graph:
    """The graph of a node's decomposition; its placeholders are the node's inputs."""
    inputs, op = node.all_input_nodes, cast(Any, node.target)

    def call(*values: Any) -> Any:
        by_node = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, node.kwargs), by_node.__getitem__)
        return op(*args, **kwargs)

    values = [n.meta["val"] for n in inputs]
    fake = next(v.fake_mode for v in [*values, node.meta["val"]] if isinstance(v, FakeTensor))
    with fake:
        return make_fx(call, decomposition_table=dict(table))(*values).graph


def _alike(node: fx.Node) -> Any:
    """Equal for nodes with the same decomposition: the op, its arguments, and what is known of its inputs."""
    places = {n: f"input {place}" for place, n in enumerate(node.all_input_nodes)}
    return node.target, repr(fx.map_arg((node.args, node.kwargs), places.get)), *map(_known, places)


def _known(node: fx.Node) -> Any:
    value = node.meta["val"]
    if not isinstance(value, FakeTensor):
        return _size(value)
    layout = *value.shape, *value.stride(), value.storage_offset()
    return id(value.constant), value.dtype, value.device, value.ndim, *map(_size, layout)


def _size(value: Any) -> Any:
    return value.node.expr if isinstance(value, torch.SymInt) else (type(value), value)


def _inlined(
    node: fx.Node, table: Mapping[Any, Callable[..., Any]], sizes: dict[Any, fx.Node], known: dict[Any, fx.Graph]
) -> Any:
    """Replace a node by the nodes of its decomposition; returns the last of them."""
    inputs, alike = node.all_input_nodes, _alike(node)
    if alike not in known:
        known[alike] = _simpler(node, table)
    parts = known[alike]
    by_node = dict(zip((n for n in parts.nodes if n.op == "placeholder"), inputs, strict=True))
    for part in parts.nodes:
        value = part.meta.get("val")
        if part.op == "output":
            result = fx.map_arg(part.args[0], by_node.__getitem__)
        elif isinstance(value, torch.SymInt) and value.node.expr in sizes:
            by_node[part] = sizes[value.node.expr]
        elif part.op != "placeholder":
            if part.target is torch.ops.aten.sym_numel.default and part.args[0].meta["val"].ndim == 1:
                part.target, part.args = (
                    torch.ops.aten.sym_size.int,
                    (part.args[0], 0),
                )  # the exporter can translate this one
            with node.graph.inserting_before(node):
                by_node[part] = node.graph.node_copy(part, by_node.__getitem__)
            by_node[part].meta = node.meta | {"val": value}
            if isinstance(value, torch.SymInt):
                sizes[value.node.expr] = by_node[part]
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
    """The names of the inputs' free sizes, in order; `h/2` counts as `h`."""
    named = (d for spec in source.inputs.values() for d in spec.shape if isinstance(d, str))
    return list(dict.fromkeys(_part_of(d)[0] for d in named))


def _part_of(size: str) -> tuple[str, int]:
    """The name and the divisor of a size. A batch of one is traced as a whole batch."""
    return part_of("batch" if size == ANY else size)


def sizes_of(source: ComponentSpec) -> dict[str, list[Any]]:
    """The sizes of each input: a number, or the name of a free size, the number that divides it, and its most units.

    Sizes of one name have as many units.
    """

    def of(named: str) -> tuple[str, int, int]:
        name, part = _part_of(named)
        return name, source.multiples.get(name, 1) // part, MOST.get(name, MOST_UNITS)

    return {name: [d if isinstance(d, int) else of(d) for d in spec.shape] for name, spec in source.inputs.items()}


def _example(source: ComponentSpec, spec: TensorSpec) -> torch.Tensor:
    # every name has another size, and none is 1: the exporter would take equal sizes as one, and 1 as a constant
    chosen = {name: (2 + i) * source.multiples.get(name, 1) for i, name in enumerate(_sizes(source))}
    parts = [(d, 1) if isinstance(d, int) else _part_of(d) for d in spec.shape]
    shape = [(d if isinstance(d, int) else chosen[d]) // part for d, part in parts]
    return torch.zeros(shape, dtype=getattr(torch, spec.dtype))


def _dynamic(source: ComponentSpec) -> dict[str, dict[int, Any]]:
    units = {n: torch.export.Dim(f"{n}_units", min=1, max=MOST.get(n, MOST_UNITS)) for n in _sizes(source)}

    def free(named: str) -> Any:
        name, part = _part_of(named)
        multiple = source.multiples.get(name, 1) // part
        return units[name] if multiple == 1 else multiple * units[name]

    return {
        name: {axis: free(d) for axis, d in enumerate(spec.shape) if isinstance(d, str)}
        for name, spec in source.inputs.items()
    }


def _name_sizes(model: ir.Model, source: ComponentSpec) -> None:
    """Replace the exporter's symbols in all shapes: by `height_units` if sizes are multiples, else by `batch`."""
    renamed: dict[str, str] = {}
    inputs: Any = model.graph.inputs
    for value in inputs:
        for dim, name in zip(value.shape, source.inputs[value.name].shape, strict=True):
            if isinstance(name, str):
                symbol = re.search(r"[a-z]\d+", str(dim.value))[0]  # type: ignore[index]
                whole = _part_of(name)[0]
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
    _free_rows(model)


def _free_rows(model: ir.Model) -> None:
    """Give the leading axis of inputs that may have one row names of their own, and of all that is computed from them.

    The trace takes every batch as the same size. Runtimes take sizes of the same name as equal, and share memory.
    """
    whole = next((v for v in model.graph.inputs if v.shape and v.shape[0] == "batch"), None)
    if whole is None:
        return
    rows: dict[ir.Value, str | None] = {}  # value that may have one row -> the name of its axis, if it is known
    for value in model.graph.inputs:
        if value.shape and value.shape[0] == ANY:
            rows[value] = f"{value.name}_rows"
    counts: set[ir.Value] = set()  # values that are computed from the number of tiles
    tiles: set[ir.Value] = set()  # values that have a row for each tile
    for node in model.graph:
        if node.op_type == "Shape":
            if _counts_tiles(node):
                counts |= set(node.outputs)
                if node.inputs[0] in rows:
                    node.replace_input_with(0, whole)
            continue
        inputs = [v for v in node.inputs if v is not None]
        counted, tiled = any(v in counts for v in inputs), any(v in tiles or _has_batch(v) for v in inputs)
        batched = [v for v in inputs if v in rows]
        if counted and not batched and not tiled:
            counts |= set(node.outputs)
        elif tiled or (counted and node.op_type == "Expand"):
            tiles |= set(node.outputs)
        elif batched:
            names = {rows[v] for v in batched}
            rows |= dict.fromkeys(node.outputs, names.pop() if len(names) == 1 else None)
    for value, name in rows.items():
        if value.shape is not None and not value.is_graph_output():
            dims = [d if isinstance(d, int) else str(d.value) for d in value.shape]
            value.shape = ir.Shape([name if d in ("batch", ANY) else d for d in dims])


def _counts_tiles(node: ir.Node) -> bool:
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return (start is None or start.as_int() == 0) and end is not None and end.as_int() == 1


def _has_batch(value: ir.Value) -> bool:
    return value.is_graph_input() and value.shape is not None and value.shape[0] == "batch"


def _unresolve(model: ir.Model, parameters: set[str]) -> None:
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        value.shape, value.type = ir.Shape(tensor.shape), ir.TensorType(tensor.dtype)
        if name in parameters:
            value.const_value = ir.ExternalTensor(
                UNRESOLVED, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape), name=name
            )


def _slim(model: ir.Model) -> None:
    """Drop stack traces and source lines, which are larger than the graph and differ between machines."""
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
    """Collect garbage rarely: a sixth of the time of tracing goes into checking objects that stay alive."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@contextlib.contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Hide the remarks of these loggers, and warnings, about optional packages and PyTorch's internals."""
    loggers = [logging.getLogger(name) for name in names]
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
