"""The error of an op's implementation against its float32 reference, and the allowed error.

A kernel is allowed twice the error of plain PyTorch in the same type, two roundings of its largest result, and the
rounding of its sums in another order: the random roundings in a sum of n numbers seldom add up to more than twice the
root of n. Plain PyTorch is allowed a few roundings of the largest result. Ops that choose a codeword are judged by its
score, which may lie below the best by the rounding of two scores. Run as a command, this file judges the kernels under
Triton's interpreter and prints JSON.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tilewright.kernels.codebook import codewords
from tilewright.kernels.jit import INTERPRETED, runs_kernels
from tilewright.kernels.sample import EIGHT_BIT, Sample, sample, type_name
from tilewright.kernels.table import KERNELS, Op

__all__ = ["GPU", "INTERPRETER", "AccuracyRow", "Judge", "interpreted", "on_gpu", "types_on_gpu", "without_kernels"]

# roundings of the largest result: short types round once, when results are stored; float32 rounds within sums too.
# Measured are at most 3 and 14
ROUNDINGS = {torch.float32: 32}
FEW_ROUNDINGS = 8
NEVER = float("inf")
INTERPRETER, GPU = "triton, interpreted", "triton on GPU"


@dataclass(frozen=True)
class AccuracyRow:
    """The accuracy of one implementation in one type."""

    op: str
    case: str
    implementation: str
    type: str
    error: float = NEVER  # of the worst result; for a choice, the distance of its score from the best
    allowed: float = 0.0
    equal_indices: float | None = None  # share of equal choices, for ops that choose
    why: str = ""  # the reason if there are no results

    @property
    def passes(self) -> bool:
        """Whether the error is allowed; an error that is not finite never is."""
        return self.error <= self.allowed


class Judge:
    """The results of the reference and of plain PyTorch for one call; other results are compared with them."""

    def __init__(self, call: Sample) -> None:
        self.call = call
        exactly = _Widened() if call.case == "small" else nullcontext()
        with torch.no_grad(), exactly:
            self.expected = _several(call.op.reference(*call.arguments, **call.options))
        with torch.no_grad(), without_kernels():
            self.usual = _several(call.op.run(*call.arguments, **call.options))

    def row(self, implementation: str, results: Any = None) -> AccuracyRow:
        """The verdict on these results; without any, on those of plain PyTorch."""
        plain = results is None
        results = self.usual if plain else _several(results)
        call = self.call
        about = call.op.name, call.case, implementation, type_name(call.dtype)
        if [r.shape for r in results] != [e.shape for e in self.expected]:
            return AccuracyRow(*about, why="results of another shape")
        if results[0].dtype == torch.int32:
            indices, codes = results
            codebook = call.arguments[-1]
            inside = bool(((indices >= 0) & (indices < codebook.shape[1])).all())
            if not inside or not torch.equal(codes, codewords(indices, codebook)):
                return AccuracyRow(*about, why="the codes are not the codewords of the indices")
            equal = (indices == self.expected[0]).double().mean().item()
            return AccuracyRow(*about, *self._below_best(indices), equal)
        return AccuracyRow(*about, *self._worst(results, plain=plain))

    def _worst(self, results: tuple[Tensor, ...], *, plain: bool) -> tuple[float, float]:
        pairs = []
        order = self._order()
        for result, expected, usual in zip(results, self.expected, self.usual, strict=True):
            largest = expected.abs().max().item()
            rounding = torch.finfo(usual.dtype).eps * largest
            off = _largest(result, expected)
            of_type = ROUNDINGS.get(usual.dtype, FEW_ROUNDINGS) * rounding
            of_kernels = 2 * _largest(usual, expected) + 2 * rounding + order * largest
            pairs.append((off, of_type if plain else of_kernels))
        return max(pairs, key=lambda pair: pair[0] / pair[1] if pair[0] == pair[0] else NEVER)

    def _below_best(self, indices: Tensor) -> tuple[float, float]:
        exact = scores(self.call, torch.float64)
        chosen = exact.gather(-1, indices.long().unsqueeze(-1)).squeeze(-1)
        allowed = 0.0
        if self.call.op.multiplies:
            rounding = 2 * torch.finfo(torch.float32).eps + self._order()
            allowed = 2 * _largest(scores(self.call, self.usual[1].dtype), exact) + rounding * exact.abs().max().item()
        return (exact.amax(-1) - chosen).max().item(), allowed

    def _order(self) -> float:
        # a share of the largest result; sums are in float32 even if results are in a shorter type
        return 2 * torch.finfo(torch.float32).eps * self.call.op.longest_sum(*self.call.arguments) ** 0.5


def scores(call: Sample, dtype: torch.dtype) -> Tensor:
    """The score of every codeword [..., G, K], computed in a type."""
    arguments: list[Any] = [a if a is None else a.to(dtype) for a in call.arguments]
    *inputs, codebook = arguments
    if call.op.name == "codebook_nearest":
        latents = inputs[0].unflatten(-1, (codebook.shape[0], -1))
        return torch.einsum("...gd,gkd->...gk", latents, codebook) - codebook.square().sum(-1) / 2
    if call.op.name == "codebook_from_hidden":
        hidden, weight, bias = inputs
        logits = hidden @ weight.T
        logits = logits * call.options["scale"].to(dtype) if "scale" in call.options else logits
        return _by_group(logits if bias is None else logits + bias, codebook)
    return _by_group(inputs[0], codebook)


class _Widened(TorchFunctionMode):
    """Runs a reference in float64, so that the error of float32 itself can be measured."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (Tensor.double if func is Tensor.float else func)(*args, **(kwargs or {}))


def _by_group(logits: Tensor, codebook: Tensor) -> Tensor:
    return logits.unflatten(-1, codebook.shape[:2])


def _several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _largest(result: Tensor, expected: Tensor) -> float:
    return (result.double() - expected.double()).abs().max().item()


@contextmanager
def without_kernels() -> Iterator[None]:
    """Use PyTorch's own operations in the place of our kernels, also on a GPU."""
    modules = [vars(sys.modules[op.reference.__module__]) for op in KERNELS.values() if op.kernel_launches is not None]
    for module in modules:
        module["runs_kernels"] = lambda x: False
    try:
        yield
    finally:
        for module in modules:
            module["runs_kernels"] = runs_kernels


def interpreted(ops: Sequence[Op]) -> list[AccuracyRow]:
    """The kernels under Triton's interpreter. They run in another process, as one process interprets or compiles."""
    command = [sys.executable, "-m", "tilewright.kernels.accuracy", *(op.name for op in ops)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return [AccuracyRow(**row) for row in json.loads(ran.stdout)]


def types_on_gpu(op: Op, case: str) -> list[torch.dtype]:
    """The types in which compiled kernels are judged. Published sizes are meant for short types."""
    short = [torch.float16, torch.bfloat16]
    if op.eight_bit and torch.cuda.get_device_capability() >= (8, 9):
        short.append(EIGHT_BIT)
    return [torch.float32, *short] if case == "small" else short


def on_gpu(op: Op, case: str, dtype: torch.dtype) -> AccuracyRow:
    """The verdict on a compiled kernel."""
    call = sample(op, case, dtype, "cuda")
    with torch.no_grad():
        results = op.run(*call.arguments, **call.options)
    return Judge(call).row(GPU, results)


def main(names: list[str]) -> None:
    """Judge these ops under the interpreter, and print JSON."""
    assert INTERPRETED
    torch.set_num_threads(1)
    rows = []
    for name in names:
        for dtype in (torch.float32, torch.float16):  # the interpreter reads bfloat16 as integers
            call = sample(KERNELS[name], "small", dtype)
            rows.append(Judge(call).row(INTERPRETER, call.op.run(*call.arguments, **call.options)))
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1:])
