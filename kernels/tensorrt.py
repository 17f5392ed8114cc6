"""The kernels inside TensorRT: ahead-of-time Quick plugins of the namespace `tilewright`, from the launches of PyTorch.

    register()        before a graph is parsed; from then on TensorRT takes a node by its name
    PLUGINS           the names, and the inputs that each takes, in order

TensorRT chooses a plugin by its name alone, and a plugin's inputs are fixed. So an op whose inputs may be left out is
one plugin for every form that systems use, by the name it has in graphs: `QkvNormRope_without_c`. Whoever prepares a
graph for TensorRT writes every attribute of the face out, and inlines the function of a node that is not in PLUGINS.

An op's plan is made of tensors without data whose dynamic dimensions are symbols, so sizes, grid and output shapes come
out as expressions of the inputs' dimensions. What a plan takes as constants (channels, heads, codes) must be fixed in
the network; what it hands to the kernel as sizes (batch, tokens) may vary.

TensorRT passes a kernel its inputs, its sizes (32 bits each) and its outputs, in this order, and gives no workspace.
The engine holds PTX, and needs neither Python nor Triton to run.
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
from tilewright.kernels.jit import Launch
from tilewright.kernels.table import KERNELS, Op

__all__ = ["PLUGINS", "ptx_of", "register"]

# op -> what each form that systems use leaves out
FORMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "concat_project": ((),),
    "qkv_norm_rope": (("c",), ("c", "cos", "sin"), ("c", "hq", "hk", "hv", "norm_q", "norm_k")),
    "joint_attention": ((),),
    "codebook_nearest": ((),),
    "codebook_from_logits": ((),),
    "codebook_from_hidden": ((),),
}
ONE_KERNEL: dict[str, dict[str, int]] = {"codebook_from_hidden": {"shares": 1}}  # what a plan needs to be one launch
TABLES = ("cos", "sin")  # float32 in a network of any type, or of its type
TYPES = {
    trt.float16: torch.float16,
    trt.bfloat16: torch.bfloat16,
    trt.float32: torch.float32,
    trt.int32: torch.int32,
}
FLOATS = ("FP16", "BF16", "FP32")
# the parser hands an attribute over as an array of one, which 10.16 cannot turn into a number with NumPy 2.4
ATTRIBUTES: dict[str, Any] = {
    "int": np.ndarray[Any, np.dtype[np.int32]],
    "float": np.ndarray[Any, np.dtype[np.float32]],
}
MADE = tuple[str | bytes, str | bytes, trtp.KernelLaunchParams, trtp.SymExprs]  # as TensorRT wants it written
ANY = inspect.Parameter.empty

_target: dict[str, int] = {}


def _forms() -> dict[str, tuple[Op, Face, tuple[str, ...]]]:
    forms = {}
    for op in map(KERNELS.__getitem__, FORMS):
        assert op.face is not None
        for missing in FORMS[op.name]:
            inputs = tuple(name for name in plain(op.face.inputs) if name not in missing)
            forms[op.face.called(inputs)] = op, op.face, inputs
    return forms


PLUGINS = {name: inputs for name, (_, _, inputs) in _forms().items()}


def register(arch: int | None = None) -> None:
    """Make the plugins known to TensorRT in this process, compiled for this capability (90) or this machine's GPU.

    Where no GPU can be seen, that is 90. Called again, it changes the capability.
    """
    if not _target:
        for name, form in _forms().items():
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

    def described(*descs: Any, **values: Any) -> Any:
        shapes = _Shapes()
        with shapes.fake:  # nothing is fixed yet: TensorRT asks for types before it has sizes
            tensors = [shapes.tensor(desc, [-1] * len(desc.shape_expr)) for desc in descs]
            results = _several(op.run(**_arguments(face, inputs, tensors, values)))
        return tuple(
            trtp.from_shape_expr(tuple(map(shapes.expression, result.shape)), _trt_type(result)) for result in results
        )

    def tuned(*_: Any) -> Any:
        return [trtp.AutoTuneCombination(", ".join(types), "LINEAR") for types in _types(face, inputs)]

    def made(*everything: Any) -> Any:
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
    _sign(described, dict.fromkeys(inputs, trtp.TensorDesc) | attributes, GenericAlias(tuple, outputs))
    _sign(tuned, dict.fromkeys((*inputs, "outputs"), ANY))
    _sign(made, dict.fromkeys((*inputs, *attributes, "outputs", "tactic"), ANY), MADE)
    trtp.register(plugin, lazy_register=False)(described)
    trtp.autotune(plugin)(tuned)
    trtp.aot_impl(plugin)(made)


def _sign(function: Any, parameters: dict[str, Any], returns: Any = ANY) -> None:
    """Give a function of any arguments the signature that TensorRT reads."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    listed = [inspect.Parameter(name, kind, annotation=annotation) for name, annotation in parameters.items()]
    function.__signature__ = inspect.Signature(listed, return_annotation=returns)


def _types(face: Face, inputs: tuple[str, ...]) -> list[list[str]]:
    """Every combination of types that is taken: inputs, then outputs."""
    pairs = [(own, own) for own in FLOATS]
    if set(TABLES) & set(inputs):
        pairs += [("FP16", "FP32"), ("BF16", "FP32")]
    return [
        [table if name in TABLES else own for name in inputs]
        + ["INT32" if output.endswith(":int32") else own for output in face.outputs]
        for own, table in pairs
    ]


def _arguments(face: Face, inputs: tuple[str, ...], tensors: list[Tensor], values: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the op: what is left out is none, attributes are numbers."""
    given = dict(zip(inputs, tensors, strict=True))
    return dict.fromkeys(plain(face.inputs)) | given | {name: value.item() for name, value in values.items()}


def _launch(plugin: str, op: Op, tensors: list[Tensor], arguments: dict[str, Any]) -> Launch:
    """The one kernel call of the op's plan, if TensorRT can make it."""
    assert op.plan is not None
    fix = f"{plugin} is compiled for its channels, heads and codes: fix every dimension but batch and tokens"
    try:
        launches, results = op.plan(**arguments, arch=_target["arch"], **ONE_KERNEL.get(op.name, {}))
    except GuardOnDataDependentSymNode as error:
        raise ValueError(fix) from error
    (launch,) = launches
    if any(isinstance(constant, SymInt) for constant in launch.constants.values()):
        raise ValueError(fix)
    # the kernel is passed the network's tensors in their order: none that the plan would copy or put elsewhere
    taken = [argument for argument in launch.arguments.values() if isinstance(argument, Tensor)]
    for mine, theirs in zip(taken, (*tensors, *_several(results)), strict=True):
        if mine.untyped_storage()._cdata != theirs.untyped_storage()._cdata:
            raise ValueError(f"{plugin} broadcasts nothing: give every input its full shape, of fixed sizes")
    return launch


def _several(results: Any) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


class _Shapes:
    """Tensors without data, whose dynamic dimensions stand for TensorRT's expressions."""

    def __init__(self) -> None:
        self.symbols = ShapeEnv()
        self.fake = FakeTensorMode(shape_env=self.symbols)
        self.meant: dict[Any, Any] = {}

    def tensor(self, desc: Any, sizes: Iterable[int]) -> Tensor:
        """What TensorRT describes; -1 is dynamic."""
        if desc.dtype not in TYPES:
            raise ValueError(f"the plugins take {', '.join(FLOATS)}, not {desc.dtype}")
        known = [self._symbol(e) if size < 0 else size for size, e in zip(sizes, desc.shape_expr, strict=True)]
        return torch.empty(known, dtype=TYPES[desc.dtype], device="meta")

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
            # what is subtracted comes last, so that nothing is negative on the way
            less, more = sympy.sift(e.args, lambda term: term.could_extract_minus_sign(), binary=True)
            return reduce(operator.sub, [self._translated(-term) for term in less], self._joined(operator.add, more))
        if e.is_Mul:
            return self._joined(operator.mul, e.args)
        if isinstance(e, FloorDiv):
            return self._joined(operator.floordiv, e.args)
        raise NotImplementedError(f"TensorRT has no expression for {e}")

    def _joined(self, operation: Callable[[Any, Any], Any], terms: Iterable[Any]) -> Any:
        return reduce(operation, map(self._translated, terms))


def _trt_type(tensor: Tensor) -> Any:
    return next(theirs for theirs, ours in TYPES.items() if ours == tensor.dtype)


def _ptx_version(arch: int) -> int:
    """8.4 came with CUDA 12.4 and 8.7 with CUDA 12.8; an older driver refuses the engine."""
    return 84 if arch <= 90 else 87


def ptx_of(kernel: Compiled) -> tuple[str, str]:
    """The kernel's name, and its PTX with the declared parameters only: Triton adds pointers that nobody would pass."""
    head, entry, rest = kernel.asm["ptx"].partition(f".entry {kernel.name}(")
    listed, close, body = rest.partition(")")
    parameters = listed.split(",")
    count = len(kernel.parameters)
    if len(parameters) < count:
        raise RuntimeError(f"{kernel.name} has {len(parameters)} parameters in PTX, and {count} in Python")
    for hidden in (parameter.split()[-1] for parameter in parameters[count:]):
        if re.search(rf"\b{hidden}\b", body):
            raise RuntimeError(f"{kernel.name} reads {hidden}, a pointer to memory that TensorRT does not give")
    # where the source lay is nobody's business
    body = re.sub(r"^\s*\.(?:loc|file)\s.*\n", "", body.partition("\t.section\t.debug_")[0], flags=re.MULTILINE)
    ptx = f"{head}{entry}{','.join(parameters[:count])}\n{close}{body}"
    # an engine holds the kernels of many nodes: one name is one kernel
    name = f"{kernel.name}_{hashlib.sha256(ptx.encode()).hexdigest()[:12]}"
    return name, ptx.replace(kernel.name, name)
