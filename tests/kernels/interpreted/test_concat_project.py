"""The kernel of concat_project beyond its paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import concat_project as called
from support.cases import maker
from support.launched import launched
from support.textbook import assert_as_exact
from tilewright.kernels.concat_project import concat_project

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNEL = ["_concat_project_kernel"]


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=2),
    st.integers(1, 70),
    st.none() | st.integers(1, 70),
    st.integers(1, 140),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_any_sizes(rows, x, c, out, dtype, seed):
    arguments, _ = called(maker(dtype, seed), rows, x, c, out)
    y, kernels = launched(concat_project, *arguments)
    assert kernels == KERNEL
    assert_as_exact("concat_project", y, arguments)


@pytest.mark.parametrize("result", DTYPES, ids=str)
def test_eight_bits_with_their_scale_give_the_type_of_h(result):
    (x, c, weight, _), _ = called(maker(torch.float8_e4m3fn), (2, 70), 40, 24, 133)
    arguments = x, c, weight, maker(result)(133), torch.tensor(0.37)
    y, kernels = launched(concat_project, *arguments)
    assert kernels == KERNEL and y.dtype == result
    assert_as_exact("concat_project", y, arguments)


def test_the_scale_multiplies_the_products_and_not_h():
    arguments = torch.ones(1, 2), torch.ones(1, 1), torch.ones(4, 3), torch.full((4,), 0.5), torch.tensor(2.0)
    y, kernels = launched(concat_project, *arguments)
    assert kernels == KERNEL and y.tolist() == [[6.5] * 4]


def test_views_are_read_as_what_they_show():
    made = maker(torch.float32)
    x, c = made(9, 2, 40).transpose(0, 1), made(2, 9, 48)[..., ::2]
    weight, h = made(64, 30).T, made(1, 1, 30).expand(2, 9, 30)
    y, kernels = launched(concat_project, x, c, weight, h)
    assert kernels == KERNEL
    assert_as_exact("concat_project", y, (x, c, weight, h))
