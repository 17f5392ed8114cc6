"""Every op on a GPU, at the sizes that the systems call it and at odd ones.

Results may be off by twice what plain PyTorch in the same type is off, both from the float32 reference, in the worst
element and in the root of the mean square; a chosen code's score may be below the best by what rounding does to it.
"""

import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from support.cases import CASES, PLAIN_CASES, grid, maker
from support.cases import call as odd
from support.textbook import SCORES, assert_right, cast, lowest_best
from tilewright.kernels.accuracy import without_kernels
from tilewright.kernels.codebook import codewords
from tilewright.kernels.jit import Launch
from tilewright.kernels.joint_attention import joint_attention_reference
from tilewright.kernels.table import KERNELS, Op

DEVICE = "cuda"
SHORT = (torch.float16, torch.bfloat16)
EIGHT = torch.float8_e4m3fn
ORDER = 1e-5  # what float32 sums of O(1) numbers lose in another order
CHOICES = {name: op for name, op in KERNELS.items() if name.startswith("codebook_")}

Call = tuple[tuple[Any, ...], dict[str, Any]]


def call(op: Op, case: str, dtype: torch.dtype) -> Call:
    """Random arguments, scaled so that products of them are O(1)."""
    wide = torch.bfloat16 if dtype == EIGHT else dtype
    generator = torch.Generator(DEVICE).manual_seed(0)

    def made(*sizes: int, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(sizes, generator=generator, device=DEVICE)
        if len(sizes) == 2 and dtype is None:
            values /= sizes[1] ** 0.5
        return values.to(dtype or wide)

    given, options = op.cases[case](made)
    if op.name in CHOICES:  # a matrix too, but no weight
        given = (given[0] * given[0].shape[1] ** 0.5, *given[1:])
    return (in_eight_bits(given), options) if dtype == EIGHT else (given, options)


def in_eight_bits(given: tuple[Any, ...]) -> tuple[Any, ...]:
    """What is multiplied fills the type's range; the product of the scales comes last."""
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU does not multiply float8_e4m3fn")
    last = 3 if len(given) == 4 and given[2].ndim == 2 else 2  # x, c and weight, or hidden and weight
    *multiplied, weight = given[:last]
    scales = [max(t.abs().max().float() for t in part) / 448 for part in (multiplied, [weight])]
    eight = [(t.float() / scales[t is weight]).to(EIGHT) for t in given[:last]]
    return (*eight, *given[last:], scales[0] * scales[1])


def several(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def launched(run: Callable[..., Any], *arguments: Any, **options: Any) -> tuple[tuple[Tensor, ...], list[str]]:
    """Results, and the kernels that made them."""
    names: list[str] = []
    launch = Launch.__call__

    def noted(self: Launch) -> None:
        names.append(self.kernel.__name__)
        launch(self)

    with mock.patch.object(Launch, "__call__", noted), poisoned():
        results = several(run(*arguments, **options))
    torch.cuda.synchronize()
    return results, names


def by_heads(*given: Tensor) -> tuple[Tensor, Tensor]:
    """The reference of attention; the scores of all heads at once would take 23 GB."""
    heads = (joint_attention_reference(*(t[:, h : h + 1] for t in given)) for h in range(given[0].shape[1]))
    o1, o2 = (torch.cat(parts, -1) for parts in zip(*heads, strict=True))
    return o1, o2


def by_rows(reference: Callable[..., tuple[Tensor, Tensor]], rows: Tensor, *rest: Any) -> Tensor:
    """The indices of the reference; the distances of all rows at once would take 17 GB."""
    return torch.cat([reference(some, *rest)[0] for some in rows.split(2048)])


def errors(found: Tensor, right: Tensor) -> tuple[float, float]:
    """In the worst element; the root of the mean square."""
    apart = found.double() - right.double()
    return apart.abs().max().item(), apart.square().mean().sqrt().item()


def score(name: str, indices: Tensor, first: Tensor, *rest: Any) -> Tensor:
    """Of chosen codes [rows, G], in float64."""
    if name == "codebook_nearest":
        chosen = codewords(indices, rest[0].double())
        return -(first.double() - chosen).square().unflatten(-1, (rest[0].shape[0], -1)).sum(-1) / 2
    book = rest[0] if name == "codebook_from_logits" else rest[2]
    places = indices.long() + torch.arange(0, book.shape[0] * book.shape[1], book.shape[1], device=DEVICE)
    if name == "codebook_from_logits":
        return first.double().gather(1, places)
    weight, bias, _, *scale = rest
    products = torch.einsum("nc,ngc->ng", first.double(), weight.float()[places].double())
    return products * (scale[0].double() if scale else 1) + bias.double()[places]


def rounding(op: Op, dtype: torch.dtype, best: Tensor) -> Tensor:
    """By how much two scores may be confused."""
    if not op.multiplies:
        return torch.zeros_like(best)
    if dtype == EIGHT:  # Hopper adds products of 8 bits in fewer bits than float32 has; PyTorch rounds to bfloat16
        return best.abs() * torch.finfo(torch.bfloat16).eps
    return torch.full_like(best, 10 * ORDER)


def types(op: Op, case: str) -> tuple[torch.dtype, ...]:
    return (*SHORT, *((torch.float32,) if case == "small" else ()), *((EIGHT,) if op.eight_bit else ()))


PUBLISHED = [
    pytest.param(op, case, dtype, id=f"{name}-{case}-{str(dtype)[6:]}")
    for name, op in KERNELS.items()
    for case in op.cases
    for dtype in types(op, case)
]


@pytest.mark.parametrize(("op", "case", "dtype"), PUBLISHED)
def test_published_sizes_are_as_right_as_plain_pytorch(op: Op, case: str, dtype: torch.dtype) -> None:
    given, options = call(op, case, dtype)
    found, kernels = launched(op.run, *given, **options)
    assert kernels
    if op.name in CHOICES:
        indices, codes = found
        book = given[1] if len(given) == 2 else given[3]
        assert indices.dtype == torch.int32 and ((indices >= 0) & (indices < book.shape[1])).all()
        assert torch.equal(codes, codewords(indices, book))
        best = score(op.name, by_rows(op.reference, *given), *given)
        assert (score(op.name, indices, *given) >= best - rounding(op, dtype, best)).all()
        return
    with without_kernels():
        usual = several(op.run(*given, **options))
    reference = by_heads if op.name == "joint_attention" else op.reference
    with mock.patch("tilewright.kernels.in_token_attention.joint_attention_reference", by_heads):
        right = several(reference(*given, **options))
    for result, eager, truth in zip(found, usual, right, strict=True):
        assert result.shape == truth.shape and result.dtype == eager.dtype
        for ours, theirs in zip(errors(result, truth), errors(eager, truth), strict=True):
            assert ours <= 2 * theirs + ORDER


ODD = CASES | PLAIN_CASES
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def on_device(given: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.to(DEVICE), given)


@DTYPES
@pytest.mark.parametrize("case", ODD.values(), ids=list(ODD))
def test_odd_sizes_are_as_right_as_the_textbook_in_the_same_type(case: Any, dtype: torch.dtype) -> None:
    given, options = on_device(odd(case, maker(dtype)))
    found, _ = launched(KERNELS[case[0]].run, *given, **options)
    results = found if len(found) > 1 else found[0]
    assert_right(case[0], results, given, options, sums_in=torch.float32)


@DTYPES
@pytest.mark.parametrize("case", [pytest.param(case, id=path) for path, case in CASES.items() if case[0] in CHOICES])
def test_of_equals_the_lowest_is_chosen(case: Any, dtype: torch.dtype) -> None:
    given, _ = on_device(odd(case, grid(dtype)))
    (indices, _), _ = launched(KERNELS[case[0]].run, *given)
    assert torch.equal(indices.cpu(), lowest_best(SCORES[case[0]](*cast(given, torch.float64)).cpu()))


NAMES = pytest.mark.parametrize("op", KERNELS.values(), ids=list(KERNELS))


@NAMES
def test_views_are_read_as_what_they_show(op: Op) -> None:
    given, options = call(op, "small", torch.bfloat16)
    expected, _ = launched(op.run, *given, **options)

    def turned(t: Tensor) -> Tensor:
        return t.transpose(-1, -2).contiguous().transpose(-1, -2) if t.ndim > 1 else t.repeat_interleave(2)[::2]

    def moved(t: Tensor) -> Tensor:
        """At an address that is no multiple of 16 bytes."""
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    for view in (turned, moved):
        found, kernels = launched(op.run, *tree_map_only(Tensor, view, given), **options)
        assert kernels
        for result, right in zip(found, expected, strict=True):
            torch.testing.assert_close(result, right)


@NAMES
def test_a_compiled_graph_gives_what_the_op_gives(op: Op) -> None:
    given, options = call(op, "small", torch.bfloat16)
    expected = several(op.run(*given, **options))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *arguments: op.run(*arguments, **options), fullgraph=True)
    for result, right in zip(several(compiled(*given)), expected, strict=True):
        torch.testing.assert_close(result, right)


class Alone(torch.nn.Module):
    """An op as a network."""

    def __init__(self, op: Op, options: dict[str, Any]) -> None:
        super().__init__()
        self.run, self.options = op.run, options

    def forward(self, *given: Any) -> Any:
        return self.run(*given, **self.options)


@NAMES
def test_a_package_runs_the_kernels_inside(op: Op, tmp_path: Path) -> None:
    given, options = call(op, "small", torch.bfloat16)
    expected, kernels = launched(op.run, *given, **options)
    exported = torch.export.export(Alone(op, options), given)
    package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "op.pt2"))
    with zipfile.ZipFile(package) as archive:
        binary = b"".join(archive.read(name) for name in archive.namelist() if name.endswith((".so", ".cubin")))
    assert all(kernel.encode() in binary for kernel in kernels) and b"tilewright::" not in binary
    found = several(torch._inductor.aoti_load_package(package)(*given))
    for result, right in zip(found, expected, strict=True):
        torch.testing.assert_close(result, right)
