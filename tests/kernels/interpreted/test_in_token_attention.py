"""The three kernels of in_token_attention, one after the other."""

import pytest
import torch

from support.cases import maker
from support.launched import launched
from support.textbook import assert_as_exact
from tilewright.kernels.in_token_attention import in_token_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "text", "heads", "width"),
    [(1, 1, 1, 1, 16), (2, 35, 21, 2, 32), (1, 128, 64, 1, 64)],
    ids=["one of all", "tails", "whole blocks"],
)
def test_it_is_that_of_the_textbook(batch, tokens, text, heads, width, dtype):
    made, dim = maker(dtype), heads * width
    angles = made(tokens, width // 2, dtype=torch.float32)
    arguments = (
        made(batch, tokens, 8),
        made(batch, tokens, 6),
        (made(dim, 20), made(dim)),  # six columns more than tokens have: a third source is in the term
        tuple(made(dim, dim) for _ in range(3)),
        tuple(made(dim) for _ in range(3)),
        (made(width), made(width)),
        (angles.cos(), angles.sin()),
        tuple(made(batch, heads, text, width) for _ in range(3)),
    )
    results, kernels = launched(in_token_attention, *arguments, heads=heads)
    assert kernels == ["_concat_project_kernel", "_qkv_norm_rope_kernel", "_joint_attention_kernel"]
    assert_as_exact("in_token_attention", results, arguments, {"heads": heads})
