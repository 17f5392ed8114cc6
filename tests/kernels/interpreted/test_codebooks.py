"""The kernels of the three codebook ops beyond their paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import CODEBOOKS, ONE_CHANNEL, grid, maker
from support.cases import codebook_from_hidden as called_with_hidden
from support.launched import launched
from support.textbook import SCORES, assert_best, assert_codes, cast, lowest_best
from tilewright.kernels.codebook_from_hidden import codebook_from_hidden, kernel_launches
from tilewright.kernels.codebook_from_logits import codebook_from_logits
from tilewright.kernels.jit import run
from tilewright.kernels.table import KERNELS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NAMES = pytest.mark.parametrize("name", CODEBOOKS)
HIDDEN, SHARES = "_codebook_from_hidden_kernel", "_best_of_shares_kernel"
SIZES = (st.lists(st.integers(1, 12), max_size=2), st.integers(1, 3), st.integers(1, 200), st.integers(1, 18))


@settings(deadline=None, max_examples=15)
@given(*SIZES, st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
@NAMES
def test_no_codeword_beats_the_chosen_one(name, rows, groups, size, width, dtype, seed):
    arguments, _ = CODEBOOKS[name](maker(dtype, seed), rows, groups, size, width)
    found, kernels = launched(KERNELS[name].run, *arguments)
    assert kernels
    assert_best(name, found, arguments, sums_in=torch.float32)


@settings(deadline=None, max_examples=15)
@given(*SIZES[:3], st.sampled_from(DTYPES), st.integers(0, 2**32 - 1))
@NAMES
def test_the_lowest_of_equals_is_chosen(name, rows, groups, size, dtype, seed):
    size = 5 * size if name == "codebook_from_logits" else size  # its blocks are the longest
    arguments, _ = CODEBOOKS[name](grid(dtype, seed), rows, groups, size, **ONE_CHANNEL[name])
    found, kernels = launched(KERNELS[name].run, *arguments)
    assert kernels
    assert torch.equal(found[0], lowest_best(SCORES[name](*cast(arguments, torch.float64))))
    assert_codes(found, arguments[-1])


@pytest.mark.parametrize("size", [3, 64, 65, 512, 600])
@NAMES
def test_the_first_of_all_equals_is_chosen(name, size):
    arguments, _ = CODEBOOKS[name](torch.ones, (2,), 2, size, 1)
    found, kernels = launched(KERNELS[name].run, *arguments)
    assert kernels and found[0].tolist() == [[0, 0], [0, 0]]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(("size", "dtype"), [(5, torch.bfloat16), (600, torch.float32)], ids=str)
@NAMES
def test_what_is_no_number_stays_in_its_row_and_in_the_codebook(name, size, dtype):
    (first, *rest), _ = CODEBOOKS[name](maker(dtype), (6,), 2, size, 3)
    expected = KERNELS[name].run(first, *rest)
    first[1], first[3], first[4, 0] = torch.nan, -torch.inf, torch.nan
    found, kernels = launched(KERNELS[name].run, first, *rest)
    assert kernels
    assert_codes(found, rest[-1])
    untouched = [0, 2, 5]
    assert torch.equal(found[0][untouched], expected[0][untouched])
    assert torch.equal(found[1][untouched], expected[1][untouched])


@pytest.mark.parametrize("size", [5, 600])
def test_logits_without_a_greatest_give_the_first(size):
    logits = torch.full((2, size), -torch.inf)
    logits[1] = torch.nan
    (indices, _), kernels = launched(codebook_from_logits, logits, torch.randn(1, size, 3))
    assert kernels and indices.tolist() == [[0], [0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shares", "size"),
    [(1, 600), (2, 64), (2, 257), (4, 130), (8, 600)],
    ids=["one program", "the second has none", "blocks and a tail", "some have none", "a block each"],
)
def test_codes_shared_among_programs_are_chosen_alike(shares, size, dtype):
    arguments, _ = called_with_hidden(maker(dtype), (2, 5), 2, size, 3, 40)
    found, kernels = launched(run, *kernel_launches(*arguments, arch=80, shares=shares))
    assert kernels == ([HIDDEN] if shares == 1 else [HIDDEN, SHARES])
    assert_best("codebook_from_hidden", found, arguments, sums_in=torch.float32)


@pytest.mark.parametrize("shares", [1, 2, 8])
def test_the_lowest_of_equals_is_chosen_across_shares_and_blocks_of_rows(shares):
    arguments, _ = called_with_hidden(grid(torch.float32), (70,), 2, 600, 2, 2)
    found, _ = launched(run, *kernel_launches(*arguments, arch=80, shares=shares))
    assert torch.equal(found[0], lowest_best(SCORES["codebook_from_hidden"](*cast(arguments, torch.float64))))
    assert_codes(found, arguments[-1])


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("shares", [1, 8])
def test_a_row_that_is_no_number_takes_the_first_of_any_shares(shares):
    (hidden, *rest), _ = called_with_hidden(maker(torch.float32), (3,), 2, 130, 2)
    hidden[1] = torch.nan
    found, _ = launched(run, *kernel_launches(hidden, *rest, arch=80, shares=shares))
    assert found[0][1].tolist() == [0, 0]
    assert_codes(found, rest[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shares", [1, 4], ids="{} shares".format)
def test_eight_bits_with_their_scale(shares, dtype):
    (hidden, weight, _, _), _ = called_with_hidden(maker(torch.float8_e4m3fn), (2, 5), 2, 260, 3, 40)
    (_, _, bias, codebook), _ = called_with_hidden(maker(dtype, 1), (2, 5), 2, 260, 3, 40)
    arguments = hidden, weight, bias, codebook, torch.tensor(0.03)
    found, kernels = launched(run, *kernel_launches(*arguments, arch=80, shares=shares))
    assert kernels == ([HIDDEN] if shares == 1 else [HIDDEN, SHARES])
    assert_best("codebook_from_hidden", found, arguments, sums_in=torch.float32)


@pytest.mark.parametrize(("scale", "best"), [(0.25, 1), (1.0, 0), (None, 0)])
def test_the_scale_multiplies_the_products_and_not_the_bias(scale, best):
    arguments = torch.ones(1, 1), torch.tensor([[3.0], [1.0]]), torch.tensor([0.0, 1.0]), torch.zeros(1, 2, 2)
    given = () if scale is None else (torch.tensor(scale),)
    (indices, _), kernels = launched(codebook_from_hidden, *arguments, *given)
    assert kernels == [HIDDEN] and indices.item() == best


@NAMES
def test_views_are_read_as_what_they_show(name):
    arguments, _ = CODEBOOKS[name](maker(torch.float32), (4, 5), 2, 70, 3)
    views = [torch.stack([t, t], -1)[..., 0] for t in arguments]
    assert not any(view.is_contiguous() for view in views)
    expected, found = KERNELS[name].run(*arguments), launched(KERNELS[name].run, *views)
    assert found[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected, strict=True))
