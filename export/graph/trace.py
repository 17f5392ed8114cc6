"""A component's network to an ONNX graph: the only caller of torch.export and torch.onnx.

Weights never exist: parameters are made on the meta device and faked, and leave as references with a name, a type, a
shape and no bytes. Buffers that the network computes for itself (frequencies, means) are real and stay in the graph.
"""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from tilewright.export.graph.ops import attach, translations
from tilewright.export.system import ComponentSpec, part_of
from tilewright.runtime.program import TensorSpec

__all__ = ["OPSET", "UNRESOLVED", "network_on_meta", "parameter_specs", "trace"]

OPSET = 23  # the first with Attention and RMSNormalization, which every target fuses
BATCH = 31  # tiles in a call, at most; with guidance they count twice, and upstream classes treat 64 in another way
UNRESOLVED = "unresolved"  # the file of a weight that is not attached yet
FACTORIES = {torch.empty, torch.zeros, torch.ones, torch.full, torch.randn, torch.rand}


class _ParametersOnMeta(TorchFunctionMode):
    """Factories that make parameters give meta tensors; those that compute (arange, tensor, ...) stay real."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in FACTORIES:
            return func(*args, **((kwargs or {}) | {"device": "meta"}))
        return func(*args, **(kwargs or {}))


def network_on_meta(source: ComponentSpec) -> nn.Module:
    """The component's network in evaluation mode, its parameters without storage."""
    with _ParametersOnMeta():
        return source.made().eval()


def parameter_specs(source: ComponentSpec) -> dict[str, TensorSpec]:
    """The names and shapes of a component's parameters."""
    named = network_on_meta(source).named_parameters()
    return {name: TensorSpec("float32", tuple(parameter.shape)) for name, parameter in named}


def trace(source: ComponentSpec) -> ir.Model:
    """The component's graph, our ops one node each; every parameter is an unresolved external tensor."""
    network = network_on_meta(source)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    _fake_parameters(network, fake)
    with fake:
        arguments = {name: _example(source, spec) for name, spec in source.inputs.items()}
    with torch.no_grad(), _quiet():
        with fake:
            exported = torch.export.export(network, (), arguments, dynamic_shapes=_dynamic(source), strict=False)
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
