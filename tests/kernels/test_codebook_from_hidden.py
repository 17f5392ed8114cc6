"""Head, argmax, gather and concatenation in one, against the textbook in loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilewright.kernels.codebook import codewords
from tilewright.kernels.codebook_from_hidden import codebook_from_hidden

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def logit(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, row: int) -> float:
    products = sum(float(w) * float(h) for w, h in zip(weight[row], hidden, strict=True))
    return products + (0.0 if bias is None else float(bias[row]))


def lookup_in_loops(hidden, weight, bias, codebook) -> tuple[np.ndarray, np.ndarray]:
    """Score every codeword of every group in order; only a larger score takes the place of an earlier one."""
    groups, size, width = codebook.shape
    indices = np.full((*hidden.shape[:-1], groups), -1, np.int32)
    codes = np.zeros((*hidden.shape[:-1], groups * width))
    for place in np.ndindex(hidden.shape[:-1]):
        for g in range(groups):
            best = -np.inf
            for k in range(size):
                score = logit(hidden[place], weight, bias, g * size + k)
                if score > best:
                    best, indices[(*place, g)] = score, k
            for d in range(width):
                codes[(*place, g * width + d)] = codebook[g, indices[(*place, g)], d]
    return indices, codes


sizes = st.fixed_dictionaries(
    {
        "batch": st.lists(st.integers(1, 4), max_size=3),  # none: one vector; three: images
        "groups": st.integers(1, 4),
        "size": st.integers(1, 8),
        "width": st.integers(1, 4),
        "channels": st.integers(1, 6),
        "bias": st.booleans(),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(deadline=None, max_examples=80)
@given(sizes, st.sampled_from(DTYPES))
def test_the_lookup_on_a_grid_of_integers_is_that_of_the_loops_in_every_type(case, dtype):
    generator = np.random.default_rng(case["seed"])
    choices = case["groups"] * case["size"]
    # at most 6 * 1 + 1 in size, exact in every type; few values, so that most cases hold ties
    hidden = generator.integers(-1, 2, (*case["batch"], case["channels"])).astype(np.float64)
    weight = generator.integers(-1, 2, (choices, case["channels"])).astype(np.float64)
    bias = generator.integers(-1, 2, choices).astype(np.float64) if case["bias"] else None
    codebook = torch.from_numpy(generator.normal(size=(case["groups"], case["size"], case["width"]))).to(dtype)
    indices, codes = codebook_from_hidden(
        *(None if a is None else torch.from_numpy(a).to(dtype) for a in (hidden, weight, bias)), codebook
    )
    expected = lookup_in_loops(hidden, weight, bias, codebook.double().numpy())
    assert (indices.dtype, codes.dtype) == (torch.int32, dtype)
    np.testing.assert_array_equal(indices.numpy(), expected[0])
    np.testing.assert_array_equal(codes.double().numpy(), expected[1])  # copied, not computed


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from([torch.float64, torch.float32]))
def test_no_codeword_scores_above_the_chosen_one(case, dtype):
    generator = np.random.default_rng(case["seed"])
    choices = case["groups"] * case["size"]
    shapes = ((*case["batch"], case["channels"]), (choices, case["channels"]), (choices,))
    hidden, weight, bias = (torch.from_numpy(generator.normal(size=shape)).to(dtype) for shape in shapes)
    codebook = torch.zeros(case["groups"], case["size"], case["width"], dtype=dtype)
    indices, _ = codebook_from_hidden(hidden, weight, bias, codebook)
    h, w, b = (t.double().numpy() for t in (hidden, weight, bias))
    # a sum of C products and a bias: each partial sum is rounded to eps of at most the sum of all sizes
    rounding = (case["channels"] + 1) ** 2 * torch.finfo(dtype).eps * (np.abs(h).max() * np.abs(w).max() + 1)
    for place in np.ndindex(indices.shape):
        rows = range(place[-1] * case["size"], (place[-1] + 1) * case["size"])
        scores = [logit(h[place[:-1]], w, b, row) for row in rows]
        assert scores[indices[place]] >= max(scores) - 2 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lowest_index_wins_a_tie(dtype):
    weight = torch.tensor([[0], [1], [1], [-1], [2], [2], [2], [0]], dtype=dtype)  # two groups of four
    codebook = torch.arange(8, dtype=dtype).reshape(2, 4, 1)
    # up: 1 and 2 tie, 4 to 6 tie; down: 3 alone, 7 alone; zero: all tie
    indices, codes = codebook_from_hidden(torch.tensor([[1], [-1], [0]], dtype=dtype), weight, None, codebook)
    assert indices.tolist() == [[1, 0], [3, 3], [0, 0]]
    assert codes.tolist() == [[1, 4], [3, 7], [0, 4]]


def test_the_bias_decides_between_equal_products():
    codebook = torch.zeros(1, 3, 1)
    indices, _ = codebook_from_hidden(torch.ones(1), torch.ones(3, 1), torch.tensor([0.0, 0.0, 1.0]), codebook)
    assert indices.tolist() == [2]


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from([torch.int32, torch.int64, torch.uint8]), st.sampled_from(DTYPES))
def test_codewords_of_indices_are_rows_of_their_groups_side_by_side(case, index_dtype, dtype):
    generator = np.random.default_rng(case["seed"])
    indices = generator.integers(0, case["size"], (*case["batch"], case["groups"]))
    codebook = torch.from_numpy(generator.normal(size=(case["groups"], case["size"], case["width"]))).to(dtype)
    codes = codewords(torch.from_numpy(indices).to(index_dtype), codebook)
    assert codes.shape == (*case["batch"], case["groups"] * case["width"])
    for place in np.ndindex(*case["batch"]):
        rows = [codebook[g, indices[(*place, g)]] for g in range(case["groups"])]
        assert torch.equal(codes[place], torch.cat(rows))


def test_indices_of_the_full_size_do_not_overflow_their_type():
    codebook = torch.arange(4 * 4096, dtype=torch.float32).reshape(4, 4096, 1)
    codes = codewords(torch.full((4,), 4095, dtype=torch.int16), codebook)
    assert codes.tolist() == [4095, 8191, 12287, 16383]


def test_an_exported_program_runs_at_other_sizes():
    class Lookup(nn.Module):
        def forward(self, hidden, weight, bias, codebook):
            return codebook_from_hidden(hidden, weight, bias, codebook)

    generator = np.random.default_rng(5)
    weight, bias = (generator.integers(-2, 3, shape).astype(np.float64) for shape in ((21, 4), (21,)))
    codebook = generator.normal(size=(3, 7, 2))
    fixed = [torch.from_numpy(a) for a in (weight, bias, codebook)]
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    arguments = (torch.zeros(2, 5, 4, dtype=torch.float64), *fixed)
    exported = torch.export.export(Lookup(), arguments, dynamic_shapes=(sizes, None, None, None))
    for batch, tokens in [(2, 5), (3, 11)]:
        hidden = generator.integers(-2, 3, (batch, tokens, 4)).astype(np.float64)
        indices, codes = exported.module()(torch.from_numpy(hidden), *fixed)
        expected = lookup_in_loops(hidden, weight, bias, codebook)
        assert indices.dtype == torch.int32
        np.testing.assert_array_equal(indices.numpy(), expected[0])
        np.testing.assert_array_equal(codes.numpy(), expected[1])
