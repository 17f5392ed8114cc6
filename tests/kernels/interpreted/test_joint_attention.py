"""The kernel of joint_attention beyond its paths."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import joint_attention as called
from support.cases import maker
from support.launched import launched
from support.textbook import assert_as_exact
from tilewright.kernels.joint_attention import joint_attention

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNEL = ["_joint_attention_kernel"]


@settings(deadline=None, max_examples=20)
@given(
    st.integers(1, 2),
    st.integers(1, 2),
    st.integers(1, 70),
    st.integers(1, 70),
    st.sampled_from([16, 32, 64]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**32 - 1),
)
def test_any_sizes(batch, heads, text, image, width, dtype, seed):
    arguments, _ = called(maker(dtype, seed), batch, heads, text, image, width)
    results, kernels = launched(joint_attention, *arguments)
    assert kernels == KERNEL
    assert_as_exact("joint_attention", results, arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("towards", [-1.0, 1.0], ids=["against", "along"])
def test_scores_far_from_zero_neither_overflow_nor_vanish(towards, dtype):
    q1, k1, v1, q2, k2, v2 = called(maker(dtype), 1, 1, 40, 70, 32)[0]
    q1, q2 = 5 + q1 / 8, 5 + q2 / 8
    k1, k2 = towards * (6 + k1 / 8), towards * (6 + k2 / 8)  # scores around 32 * 30 / sqrt(32) = 170 either way
    results, kernels = launched(joint_attention, q1, k1, v1, q2, k2, v2)
    assert kernels == KERNEL
    assert_as_exact("joint_attention", results, (q1, k1, v1, q2, k2, v2))


@pytest.mark.parametrize("place", [0, 31, 32, 39, 40, 71, 72, 109])  # of the text: 0 to 39; of the image: 40 to 109
def test_a_key_that_all_look_at_gives_its_value_wherever_it_lies(place):
    q, k, v = torch.ones(1, 1, 110, 16), torch.zeros(1, 1, 110, 16), torch.zeros(1, 1, 110, 16)
    k[:, :, place], v[:, :, place] = 100, torch.arange(16.0)
    arguments = [t[:, :, part] for part in (slice(40), slice(40, None)) for t in (q, k, v)]
    results, kernels = launched(joint_attention, *arguments)
    assert kernels == KERNEL and torch.equal(torch.cat(results, 1), torch.arange(16.0).expand(1, 110, 16))


def test_views_are_read_as_what_they_show():
    made = maker(torch.float32)
    arguments = tuple(made(2, tokens, 3, 16).transpose(1, 2) for tokens in (21, 40) for _ in range(3))
    results, kernels = launched(joint_attention, *arguments)
    assert kernels == KERNEL
    assert_as_exact("joint_attention", results, arguments)
