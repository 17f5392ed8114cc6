"""The kernel of qkv_norm_rope beyond its paths."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support.cases import maker
from support.cases import qkv_norm_rope as called
from support.launched import launched
from support.textbook import assert_as_exact
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope

KERNEL = ["_qkv_norm_rope_kernel"]


@settings(deadline=None, max_examples=25)
@given(
    st.integers(1, 3),
    st.integers(1, 40),
    st.integers(1, 4),
    st.sampled_from([16, 32, 64]),
    st.fixed_dictionaries(
        {
            "interleaved": st.booleans(),
            "x": st.integers(1, 70),
            "c": st.none() | st.integers(1, 40),
            "terms": st.sampled_from(["bias", "row", "token", None]),
            "norms": st.booleans(),
            "prefix": st.none() | st.just(0) | st.just(1),
        }
    ),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_any_sizes(batch, tokens, heads, width, more, dtype, seed):
    arguments, attributes = called(maker(dtype, seed), batch, tokens, heads, width, **more)
    results, kernels = launched(qkv_norm_rope, *arguments, **attributes)
    assert kernels == KERNEL
    assert_as_exact("qkv_norm_rope", results, arguments, attributes)


def test_the_root_is_taken_over_the_mean_square_and_epsilon():
    x, one, identity = torch.full((1, 1, 16), 0.5), torch.ones(16), torch.eye(16)
    arguments = x, None, identity, identity, identity, None, None, None, one, one
    (q, k, v), kernels = launched(qkv_norm_rope, *arguments, heads=1, epsilon=0.75)
    assert kernels == KERNEL
    assert torch.equal(q, x[None]) and torch.equal(k, x[None]) and torch.equal(v, x[None])  # 0.5 / sqrt(0.25 + 0.75)


def test_views_are_read_as_what_they_show():
    (x, c, *rest), attributes = called(maker(torch.float32), 2, 9, 2, 32, c=6, terms="row", prefix=3)
    x, c = x.transpose(0, 1).contiguous().transpose(0, 1), c.repeat_interleave(2, -1)[..., ::2]
    weights = [w.T.contiguous().T for w in rest[:3]]
    terms = [h[:1, :1].expand(2, 9, -1) for h in rest[3:6]]
    tables = [table.repeat(1, 2)[:, :16] for table in rest[8:]]
    assert not any(t.is_contiguous() for t in (x, c, *weights, *terms, *tables))
    arguments = (x, c, *weights, *terms, *rest[6:8], *tables)
    results, kernels = launched(qkv_norm_rope, *arguments, **attributes)
    assert kernels == KERNEL
    assert_as_exact("qkv_norm_rope", results, arguments, attributes)
