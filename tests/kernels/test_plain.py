"""Every op without a GPU, and its reference, at the sizes and by the textbook that its kernel is tested with."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import CASES, CODEBOOKS, ONE_CHANNEL, PLAIN_CASES, call, grid, maker
from support.textbook import SCORES, assert_as_exact, assert_best, assert_codes, assert_right, cast, lowest_best
from tilewright.kernels.table import KERNELS

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT = torch.float8_e4m3fn
ALL = CASES | PLAIN_CASES


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_an_op_does_what_the_textbook_says(case, dtype):
    name = case[0]
    arguments, attributes = call(case, maker(dtype))
    assert_right(name, KERNELS[name].run(*arguments, **attributes), arguments, attributes)


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_a_reference_does_what_the_textbook_says(case):
    name = case[0]
    arguments, attributes = call(case, maker(torch.float32))
    results = KERNELS[name].reference(*arguments, **attributes)
    found = tuple(r.contiguous() for r in results) if isinstance(results, tuple) else results
    assert_right(name, found, arguments, attributes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_every_op_of_the_table_does_what_the_textbook_says(name, dtype):
    arguments, attributes = KERNELS[name].cases["small"](maker(dtype))
    assert_right(name, KERNELS[name].run(*arguments, **attributes), arguments, attributes)


@pytest.mark.parametrize(
    ("name", "size"), [(name, size) for name, op in KERNELS.items() for size in op.cases], ids="{}".format
)
def test_published_sizes_fit_together(name, size):
    op = KERNELS[name]
    arguments, attributes = op.cases[size](
        lambda *sizes, dtype=torch.float16: torch.empty(sizes, dtype=dtype, device="meta")
    )
    found, expected = op.run(*arguments, **attributes), op.reference(*arguments, **attributes)
    shapes = [[tuple(t.shape) for t in (r if isinstance(r, tuple) else (r,))] for r in (found, expected)]
    assert shapes[0] == shapes[1]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_lowest_of_equals_is_chosen(name, rows, groups, size, dtype, seed):
    arguments, _ = CODEBOOKS[name](grid(dtype, seed), rows, groups, size, **ONE_CHANNEL[name])
    found = KERNELS[name].run(*arguments)
    assert torch.equal(found[0], lowest_best(SCORES[name](*cast(arguments, torch.float64))))
    assert_codes(found, arguments[-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CODEBOOKS)
def test_what_is_no_number_stays_in_its_row_and_in_the_codebook(name, dtype):
    (first, *rest), _ = CODEBOOKS[name](maker(dtype), (6,), 2, 50, 3)
    expected = KERNELS[name].run(first, *rest)
    first[1], first[3], first[4, 0] = torch.nan, -torch.inf, torch.nan
    found = KERNELS[name].run(first, *rest)
    assert_codes(found, rest[-1])
    untouched = [0, 2, 5]
    assert torch.equal(found[0][untouched], expected[0][untouched])


@pytest.mark.parametrize("result", DTYPES[1:], ids=str)
def test_eight_bits_are_projected_with_their_scale(result):
    (x, c, weight, _), _ = call(CASES["concat_project: tails, rows across images"], maker(EIGHT))
    arguments = x, c, weight, maker(result)(133), torch.tensor(0.37)
    y = KERNELS["concat_project"].run(*arguments)
    assert y.dtype == result
    assert_as_exact("concat_project", y, arguments)
    assert_as_exact("concat_project", KERNELS["concat_project"].reference(*arguments), arguments)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_eight_bits_are_looked_up_with_their_scale(dtype):
    case = CASES["codebook_from_hidden: one row less, two codes less"]
    (hidden, weight, _, _), (_, _, bias, codebook) = call(case, maker(EIGHT))[0], call(case, maker(dtype, 1))[0]
    arguments = hidden, weight, bias, codebook, torch.tensor(0.03)
    for compute in (KERNELS["codebook_from_hidden"].run, KERNELS["codebook_from_hidden"].reference):
        assert_best("codebook_from_hidden", compute(*arguments), arguments, sums_in=torch.float32)


@pytest.mark.parametrize(
    "path",
    [
        "concat_project: h per row",
        "qkv_norm_rope: terms per row, halves",
        "joint_attention: images and heads",
        *(f"{name}: rows in three dimensions" for name in CODEBOOKS),
    ],
)
def test_views_are_read_as_what_they_show(path):
    name = CASES[path][0]
    arguments, attributes = call(CASES[path], maker(torch.float64))
    views = tuple(None if t is None else t.mT.contiguous().mT if t.ndim > 1 else t for t in arguments)
    assert_right(name, KERNELS[name].run(*views, **attributes), views, attributes)
