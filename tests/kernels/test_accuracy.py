"""What `kernels check` calls right and wrong: rounding passes, everything else does not."""

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tilewright.kernels.accuracy import Judge, without_kernels
from tilewright.kernels.sample import sample
from tilewright.kernels.table import KERNELS

DENSE = [name for name in KERNELS if not name.startswith("codebook")]
CHOICES = [name for name in KERNELS if name.startswith("codebook")]
TYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=[(name, dtype) for name in DENSE for dtype in TYPES], ids=str)
def dense(request) -> Judge:
    name, dtype = request.param
    return Judge(sample(KERNELS[name], "small", dtype))


@pytest.fixture(params=[(name, dtype) for name in CHOICES for dtype in TYPES], ids=str)
def choice(request) -> Judge:
    name, dtype = request.param
    return Judge(sample(KERNELS[name], "small", dtype))


def test_plain_pytorch_and_the_rounded_reference_pass(dense):
    assert dense.row("torch").passes
    rounded = tuple(e.to(dense.call.dtype) for e in dense.expected)
    row = dense.row("rounded", rounded)
    assert row.passes and row.error <= torch.finfo(dense.call.dtype).eps * max(e.abs().max() for e in rounded)


def test_one_number_of_any_result_that_is_off_by_more_than_its_type_rounds_is_a_miss(dense):
    share = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}[dense.call.dtype]  # of the largest
    for i in range(len(dense.expected)):
        results = [u.clone() for u in dense.usual]
        results[i].view(-1)[7] += share * dense.expected[i].abs().max()
        assert not dense.row("off", tuple(results)).passes


@pytest.mark.parametrize("name", DENSE)
def test_where_plain_pytorch_is_exact_sums_in_another_order_pass_and_cut_factors_are_a_miss(name):
    judge = Judge(sample(KERNELS[name], "small", torch.float32))
    in_order, judge.usual = judge.usual, tuple(e.float() for e in judge.expected)
    assert judge.row("order", in_order).passes
    call = judge.call
    cut = tree_map_only(
        Tensor, lambda t: (t.view(torch.int32) & ~0x1FFF).view(torch.float32), call.arguments
    )  # as TF32
    found = call.op.run(*cut, **call.options)
    assert not judge.row("cut", found).passes


def test_results_that_are_no_numbers_or_have_another_shape_are_a_miss(dense):
    for i in range(len(dense.expected)):
        results = [u.clone() for u in dense.usual]
        results[i].view(-1)[-1] = torch.nan
        assert not dense.row("nan", tuple(results)).passes
        results[i] = dense.usual[i].unsqueeze(0)
        row = dense.row("shape", tuple(results))
        assert not row.passes and row.why == "results of another shape"


def test_the_best_codewords_pass_and_others_are_a_miss(choice):
    codebook = choice.call.arguments[-1]
    best = choice.row("exact", tuple(choice.expected))
    assert best.passes and best.equal_indices == 1
    assert choice.row("torch").passes
    worse = choice.expected[0].clone()
    worse[3, 1] = (worse[3, 1] + 1) % codebook.shape[1]
    codes = choice.expected[1].clone()
    codes[3, 8:16] = codebook[1, worse[3, 1]]
    row = choice.row("worse", (worse, codes))
    assert not row.passes and row.equal_indices == 1 - 1 / worse.numel() and row.why == ""


def test_codes_that_are_not_the_chosen_ones_are_a_miss(choice):
    indices, codes = (t.clone() for t in choice.expected)
    codes[0, 0] += 1
    assert "not the codewords" in choice.row("codes", (indices, codes)).why
    indices[0, 0] = choice.call.arguments[-1].shape[1]
    assert "not the codewords" in choice.row("beyond", (indices, choice.expected[1])).why


def test_kernels_are_back_after_plain_pytorch_even_when_that_fails():
    from tilewright.kernels import codebook_nearest, jit

    with pytest.raises(ZeroDivisionError), without_kernels():
        assert codebook_nearest.runs_kernels is not jit.runs_kernels
        raise ZeroDivisionError
    assert codebook_nearest.runs_kernels is jit.runs_kernels


def test_the_reference_is_computed_in_float64():
    judge = Judge(sample(KERNELS["in_token_attention"], "small", torch.float32))
    assert all(e.dtype == torch.float64 for e in judge.expected)
