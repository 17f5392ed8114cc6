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
        for part in (_translations, _promotions, _numbers, _stacks):
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


def _stacks() -> tuple[Any, str, Any]:
    """The exporter stores lines of source code in every node, which our graphs do not keep."""
    return fx.config, "do_not_emit_stack_traces", True
