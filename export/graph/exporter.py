"""Making PyTorch's exporter faster: results that it computes again and again are computed once.

This replaces private functions of the exporter. If one is not as expected, it stays, and tracing only takes longer.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import sympy
from torch import fx

__all__ = ["quicker"]


@contextlib.contextmanager
def quicker() -> Iterator[None]:
    """Replace the slow functions that exist, and restore them at the end."""
    with contextlib.ExitStack() as stack:
        for part in (_translations, _promotions, _numbers, _sizes, _integers, _validation, _results, _stacks):
            with contextlib.suppress(ImportError, AttributeError, KeyError):
                stack.enter_context(_replaced(*part()))
        yield


@contextlib.contextmanager
def _replaced(owner: Any, name: str, by: Any) -> Iterator[None]:
    before = vars(owner)[name]  # getattr would bind it
    setattr(owner, name, by)
    try:
        yield
    finally:
        setattr(owner, name, before)


@functools.cache
def _once(make: Callable[..., Any], **options: Any) -> Any:
    return make(**options)


def _translations() -> tuple[Any, str, Any]:
    """The exporter parses the source of every translation to ONNX for every graph, which takes 0.3 s."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    make = ONNXRegistry.from_torchlib

    def registry(**options: Any) -> Any:
        parsed = _once(make, **options)
        copied = copy.copy(parsed)
        copied.functions = {
            op: list(functions) for op, functions in parsed.functions.items()
        }  # to which ours are added
        return copied

    return ONNXRegistry, "from_torchlib", staticmethod(registry)


def _promotions() -> tuple[Any, str, Any]:
    """The exporter runs every node again when it promotes types, although their values are known."""
    from torch.onnx._internal.fx.passes import type_promotion

    interpreter, rule_of = type_promotion._TypePromotionInterpreter, type_promotion.get_type_promotion_rule
    promote, current = interpreter._maybe_promote_node, interpreter._set_current_node

    def run_node(self: Any, node: fx.Node) -> Any:
        with current(self, node):
            if rule := rule_of(node, self.type_promotion_table):
                promote(self, node, rule)
        computed = node.op == "call_function" and "val" in node.meta
        return node.meta["val"] if computed else fx.Interpreter.run_node(self, node)

    return interpreter, "run_node", run_node


def _numbers() -> tuple[Any, str, Any]:
    """Every operation on a size asks several times whether it is a number, which searches the expression."""
    return sympy.Expr, "is_number", property(functools.cache(sympy.Expr.is_number.fget))


def _sizes() -> tuple[Any, str, Any]:
    """Every operation on a size asks for it several times. PyTorch then searches it before it looks what it knows."""
    from torch.fx.experimental.sym_node import SymNode

    searched = vars(SymNode)["expr"].fget
    if not {"_replacements_version_counter", "_expr", "_expr_cache", "_expr_ver"} <= {*searched.__code__.co_names}:
        raise AttributeError("what is known of a size is kept otherwise")

    def expr(self: Any) -> Any:
        version = -1 if self.shape_env is None else self.shape_env._replacements_version_counter
        if version == 0:  # nothing is replaced
            return self._expr
        known = self._expr_cache is not None and version == self._expr_ver
        return self._expr_cache if known else searched(self)

    return SymNode, "expr", property(expr)


def _integers() -> tuple[Any, str, Any]:
    """PyTorch searches every size for symbols to see whether it is an integer."""
    from torch.fx.experimental.sym_node import SymNode

    searched = vars(SymNode)["maybe_as_int"]

    def maybe_as_int(self: Any) -> Any:
        expr = self.expr
        if isinstance(expr, sympy.Integer):
            return int(expr)
        return None if isinstance(expr, sympy.Symbol) else searched(self)

    return SymNode, "maybe_as_int", maybe_as_int


def _results() -> tuple[Any, str, Any]:
    """PyTorch keeps what an operator returns for given sizes, and makes each result twice to see that it can."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inner = vars(FakeTensorMode)["_get_output_info_for_cache_entry"]

    def described(self: Any, state: Any, key: Any, func: Any, args: Any, kwargs: Any, output: Any) -> Any:
        self._output_from_cache_entry = lambda *of: output  # in the place of the method
        try:
            return inner(self, state, key, func, args, kwargs, output)
        finally:
            del self._output_from_cache_entry

    return FakeTensorMode, "_get_output_info_for_cache_entry", described


def _validation() -> tuple[Any, str, Any]:
    """PyTorch looks up a note of every operation on sizes, which it takes only to validate its own translation."""
    from torch.fx.experimental import _config
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    name = "_create_fx_call_function"
    before = vars(ShapeEnv)[name]
    return ShapeEnv, name, before if _config.translation_validation else lambda self, op, args: (None, False)


def _stacks() -> tuple[Any, str, Any]:
    """The exporter stores lines of source code in every node, which our graphs do not keep."""
    return fx.config, "do_not_emit_stack_traces", True
