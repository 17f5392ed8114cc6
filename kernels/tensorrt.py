"""The kernels inside TensorRT, as ahead-of-time Quick plugins of the namespace `tilewright`.

    register()        makes the plugins known; call it before a graph is parsed

The plugins' names and inputs are in `forms.py`. Before a graph goes to TensorRT, every attribute of a node must be
written out, and the functions of nodes that are no plugins must be inlined.

The launches of an op are made here with tensors without data, whose dynamic dimensions are symbols. So sizes, grid and
output shapes become expressions of the inputs' dimensions. Dimensions that a launch has as constants (channels, heads,
codes) must be fixed in the network. Those that it passes to the kernel as sizes (batch, tokens) may vary.

TensorRT passes a kernel its inputs, its sizes (32 bits each) and its outputs, in this order, and no workspace. The
engine holds PTX, and needs neither Python nor Triton to run.
"""

import hashlib
import inspect
import operator
import re
from collections.abc import Callable, Iterable
from functools import reduce
from types import GenericAlias
from typing import Any

try:
    import tensorrt as trt
    import tensorrt.plugin as trtp
except ImportError as error:
    raise ImportError(f"{error}: the plugins need TensorRT, pip install 'tensorrt>=10.16'") from error

import numpy as np
import sympy
import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy.functions import FloorDiv

from tilewright.kernels.ahead import Compiled, compiled
from tilewright.kernels.face import DOMAIN, Face, plain
from tilewright.kernels.forms import TABLES, forms
from tilewright.kernels.jit import Launch
from tilewright.kernels.table import Op

__all__ = ["ptx_of", "register"]

ONE_KERNEL: dict[str, dict[str, int]] = {"codebook_from_hidden": {"shares": 1}}  # options that make it one launch
TYPES = {
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.float32: torch.float32,
    trt.int32: torch.int32,
}
FLOATS = ("FP16", "BF16", "FP32")
# the parser passes an attribute as an array of one number, which TensorRT 10.16 cannot convert with NumPy 2.4
ATTRIBUTES: dict[str, Any] = {
    "int": np.ndarray[Any, np.dtype[np.int32]],
    "float": np.ndarray[Any, np.dtype[np.float32]],
}
IMPLEMENTATION = tuple[
    str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs
]  # the signature that TensorRT expects
ANY = inspect.Parameter.empty

_target: dict[str, int] = {}


def register(arch: int | None = None) -> None:
    """Make the plugins known to TensorRT in this process, for a compute capability (90) or for this machine's GPU.

    Without a GPU the capability is 90. Another call changes it.
    """
    if not _target:
        for name, form in forms().items():
            _register(name, *form)
    _target["arch"] = arch or _arch_here()


def _arch_here() -> int:
    if not torch.cuda.is_available():
        return 90
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def _register(name: str, op: Op, face: Face, inputs: tuple[str, ...]) -> None:
    plugin = f"{DOMAIN}::{name}"
    attributes = {a.split(":")[0]: ATTRIBUTES[a.split(":")[1]] for a in face.attributes}

    def description(*descs: Any, **values: Any) -> Any:
        shapes = _Shapes()
        with shapes.fake:  # no size is known yet: TensorRT asks for types first
            tensors = [shapes.tensor(desc, [-1] * len(desc.shape_expr)) for desc in descs]
            results = _several(op.run(**_arguments(face, inputs, tensors, values)))
        return tuple(
            trtp.from_shape_expr(tuple(map(shapes.expression, result.shape)), _trt_type(result)) for result in results
        )

    def tactics(*_: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR") for types in _types(face, inputs)]

    def implementation(*everything: Any) -> Any:
        descs, values = everything[: len(inputs)], everything[len(inputs) : -2]
        shapes = _Shapes()
        with shapes.fake:
            tensors = [shapes.tensor(desc, desc.shape) for desc in descs]
            arguments = _arguments(face, inputs, tensors, dict(zip(attributes, values, strict=True)))
            launch = _launch(plugin, op, tensors, arguments)
        kernel = compiled(launch, _target["arch"], ptx_version=_ptx_version(_target["arch"]))
        grid = {f"grid_{axis}": shapes.expression(size) for axis, size in zip("xyz", launch.grid, strict=False)}
        params = trtp.KernelLaunchParams(**grid, block_x=kernel.threads, shared_mem=kernel.shared)
        sizes = [size for size in launch.arguments.values() if isinstance(size, int | SymInt)]
        extra = trtp.SymIntExprs.from_tuple([trtp.SymInt32(shapes.expression(size)) for size in sizes])
        return *ptx_of(kernel), params, extra

    outputs = (trtp.TensorDesc,) * len(face.outputs)
    _sign(description, dict.fromkeys(inputs, trtp.TensorDesc) | attributes, GenericAlias(tuple, outputs))
    _sign(tactics, dict.fromkeys((*inputs, "outputs"), ANY))
    _sign(implementation, dict.fromkeys((*inputs, *attributes, "outputs", "tactic"), ANY), IMPLEMENTATION)
    trtp.register(plugin, lazy_register=False)(description)
    trtp.autotune(plugin)(tactics)
    trtp.aot_impl(plugin)(implementation)


def _sign(function: Any, parameters: dict[str, Any], returns: Any = ANY) -> None:
    """Give a function of any arguments the signature that TensorRT reads."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)


def _types(face: Face, inputs: tuple[str, ...]) -> list[list[str]]:
    """Every allowed combination of types: inputs, then outputs."""
    pairs = [(kind, kind) for kind in FLOATS]
    if set(TABLES) & set(inputs):
        pairs += [("FP16", "FP32"), ("BF16", "FP32")]
    return [
        [table if name in TABLES else kind for name in inputs]
        + ["INT32" if output.endswith(":int32") else kind for output in face.outputs]
        for kind, table in pairs
    ]


def _arguments(face: Face, inputs: tuple[str, ...], tensors: list[Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """The op's arguments: none for inputs that are left out, numbers for attributes."""
    by_name = dict(zip(inputs, tensors, strict=True))
    return dict.fromkeys(plain(face.inputs)) | by_name | {name: value.item() for name, value in values.items()}


def _launch(plugin: str, op: Op, tensors: list[Tensor], arguments: dict[str, Any]) -> Launch:
    """The one launch of the op, if TensorRT can make it."""
    assert op.kernel_launches is not None
    fix = f"{plugin} is compiled for its channels, heads and codes: fix every dimension but batch and tokens"
    try:
        launches, results = op.kernel_launches(**arguments, arch=_target["arch"], **ONE_KERNEL.get(op.name, {}))
    except GuardOnDataDependentSymNode as error:
        raise ValueError(fix) from error
    (launch,) = launches
    if any(isinstance(constant, SymInt) for constant in launch.constants.values()):
        raise ValueError(fix)
    # TensorRT passes the network's tensors in their order, so the launch must not copy or reorder any
    launched = [argument for argument in launch.arguments.values() if isinstance(argument, Tensor)]
    for passed, expected in zip(launched, (*tensors, *_several(results)), strict=True):
        if passed.untyped_storage()._cdata != expected.untyped_storage()._cdata:
            raise ValueError(f"{plugin} does not broadcast: give every input its full shape, of fixed sizes")
    return launch


def _several(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


class _Shapes:
    """Makes tensors without data. Each of their dynamic dimensions is a symbol for an expression of TensorRT."""

    def __init__(self) -> None:
        self.symbols = ShapeEnv()
        self.fake = FakeTensorMode(shape_env=self.symbols)
        self.meant: dict[Any, Any] = {}

    def tensor(self, desc: Any, sizes: Iterable[int]) -> Tensor:
        """A tensor for TensorRT's description; a size of -1 is dynamic."""
        if desc.dtype not in TYPES:
            raise ValueError(f"the plugins take {', '.join(FLOATS)}, not {desc.dtype}")
        dimensions = [self._symbol(e) if size < 0 else size for size, e in zip(sizes, desc.shape_expr, strict=True)]
        return torch.empty(dimensions, dtype=TYPES[desc.dtype], device="meta")

    def _symbol(self, expression: Any) -> SymInt:
        size = self.symbols.create_unbacked_symint()
        self.meant[size.node.expr] = expression
        return size

    def expression(self, size: int | SymInt) -> Any:
        """A size in TensorRT's arithmetic."""
        return self._translated(size.node.expr if isinstance(size, SymInt) else sympy.Integer(size))

    def _translated(self, e: Any) -> Any:
        if e.is_Symbol:
            return self.meant[e]
        if e.is_Integer:
            return trtp.ShapeExpr(int(e))
        if e.is_Add:
            # negative terms come last, so that no intermediate sum is negative
            less, more = sympy.sift(e.args, lambda term: term.could_extract_minus_sign(), binary=True)
            return reduce(operator.sub, [self._translated(-term) for term in less], self._joined(operator.add, more))
        if e.is_Mul:
            return self._joined(operator.mul, e.args)
        if isinstance(e, FloorDiv):
            return self._joined(operator.floordiv, e.args)
        raise ValueError(f"TensorRT computes sizes with + - * // only, and not {e}: write the launch with these")

    def _joined(self, operation: Callable[[Any, Any], Any], terms: Iterable[Any]) -> Any:
        return reduce(operation, map(self._translated, terms))


def _trt_type(tensor: Tensor) -> Any:
    return next(theirs for theirs, ours in TYPES.items() if ours == tensor.dtype)


def _ptx_version(arch: int) -> int:
    """The version of PTX: 8.4 came with CUDA 12.4, 8.7 with CUDA 12.8. An older driver refuses the engine."""
    return 84 if arch <= 90 else 87


def ptx_of(kernel: Compiled) -> tuple[str, str]:
    """The kernel's name, and its PTX without the pointers that Triton adds and TensorRT does not pass."""
    head, entry, rest = kernel.asm["ptx"].partition(f".entry {kernel.name}(")
    listed, close, body = rest.partition(")")
    parameters = listed.split(",")
    count = len(kernel.parameters)
    if len(parameters) < count:
        raise RuntimeError(f"{kernel.name} has {len(parameters)} parameters in PTX, and {count} in Python")
    for hidden in (parameter.split()[-1] for parameter in parameters[count:]):
        if re.search(rf"\b{hidden}\b", body):
            raise RuntimeError(f"{kernel.name} reads {hidden}, a pointer to memory that TensorRT does not provide")
    # drop the paths of source files on this machine
    body = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", body.partition("\t.section\t.debug_")[0], flags=re.MULTILINE)
    ptx = f"{head}{entry}{','.join(parameters[:count])}\n{close}{body}"
    # an engine holds kernels of many nodes, so different kernels need different names
    name = f"{kernel.name}_{hashlib.sha256(ptx.encode()).hexdigest()[:12]}"
    return name, ptx.replace(kernel.name, name)
