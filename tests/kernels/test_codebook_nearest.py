"""The nearest codeword of each group, against distances summed in loops in float64."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tilewright.kernels.codebook_nearest import codebook_nearest

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def nearest_in_loops(latents: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """Walk every codeword of every group in order; only a smaller distance takes the place of an earlier one."""
    groups, size, width = codebook.shape
    indices = np.full((*latents.shape[:-1], groups), -1, np.int32)
    for place in np.ndindex(indices.shape):
        vector = latents[place[:-1]][place[-1] * width : (place[-1] + 1) * width]
        least = np.inf
        for k in range(size):
            distance = sum((float(z) - float(c)) ** 2 for z, c in zip(vector, codebook[place[-1], k], strict=True))
            if distance < least:
                least, indices[place] = distance, k
    return indices


def codes_in_loops(indices: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    """The codewords of all groups, side by side."""
    groups, _, width = codebook.shape
    codes = np.zeros((*indices.shape[:-1], groups * width))
    for *place, g in np.ndindex(indices.shape):
        codes[(*place, slice(g * width, (g + 1) * width))] = codebook[g, indices[(*place, g)]]
    return codes


def grid(generator: np.random.Generator, *shape: int) -> np.ndarray:
    """Small integers: every product and sum is exact in every type, so equal distances are equal numbers."""
    return generator.integers(-2, 3, shape).astype(np.float64)


sizes = st.fixed_dictionaries(
    {
        "batch": st.lists(st.integers(1, 4), max_size=3),  # none: one vector; three: images
        "groups": st.integers(1, 5),
        "size": st.integers(1, 9),
        "width": st.integers(1, 8),
        "seed": st.integers(0, 2**32 - 1),
    }
)


@settings(deadline=None, max_examples=80)
@given(sizes, st.sampled_from(DTYPES))
def test_indices_on_a_grid_of_integers_are_those_of_the_loops_in_every_type(case, dtype):
    generator = np.random.default_rng(case["seed"])
    codebook = grid(generator, case["groups"], case["size"], case["width"])  # few values: most cases hold ties
    latents = grid(generator, *case["batch"], case["groups"] * case["width"])
    found, codes = codebook_nearest(torch.from_numpy(latents).to(dtype), torch.from_numpy(codebook).to(dtype))
    assert (found.dtype, codes.dtype) == (torch.int32, dtype)
    indices = nearest_in_loops(latents, codebook)
    np.testing.assert_array_equal(found.numpy(), indices)
    np.testing.assert_array_equal(codes.double().numpy(), codes_in_loops(indices, codebook))


@settings(deadline=None, max_examples=40)
@given(sizes, st.sampled_from([torch.float64, torch.float32]))
def test_no_codeword_is_nearer_than_the_chosen_one(case, dtype):
    generator = np.random.default_rng(case["seed"])
    codebook = torch.from_numpy(generator.normal(size=(case["groups"], case["size"], case["width"]))).to(dtype)
    latents = torch.from_numpy(generator.normal(size=(*case["batch"], case["groups"] * case["width"]))).to(dtype)
    found = codebook_nearest(latents, codebook)[0].numpy()
    z, c = latents.double().numpy(), codebook.double().numpy()
    # |c|^2 / 2 - z.c is a sum of 2 D terms, each rounded to eps of it; the distance is twice that
    terms = np.abs(c).max() ** 2 / 2 + np.abs(c).max() * np.abs(z).max()
    rounding = 2 * 2 * case["width"] * torch.finfo(dtype).eps * 2 * case["width"] * terms
    for place in np.ndindex(found.shape):
        vector = z[place[:-1]].reshape(case["groups"], case["width"])[place[-1]]
        distances = np.array([np.sum((vector - codeword) ** 2) for codeword in c[place[-1]]])
        assert distances[found[place]] <= distances.min() + rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_lowest_index_wins_a_tie(dtype):
    codebook = torch.tensor([[[3, 0], [1, 0], [-1, 0], [1, 0]], [[5, 5], [5, 5], [0, 1], [1, 0]]], dtype=dtype)
    # group 0: 1 and 3 are one codeword; then 1, 2, 3 are equally far; group 1: 2 and 3 are equally far
    latents = torch.tensor([[1, 0, 0, 0], [0, 0, 5, 5], [3, 4, 0, 0]], dtype=dtype)
    assert codebook_nearest(latents, codebook)[0].tolist() == [[1, 2], [1, 0], [0, 2]]


def test_groups_read_their_own_channels_and_their_own_codebook():
    codebook = torch.tensor([[[0.0, 0.0], [9.0, 9.0]], [[9.0, 9.0], [0.0, 0.0]]])
    assert codebook_nearest(torch.tensor([0.0, 0.0, 0.0, 0.0]), codebook)[0].tolist() == [0, 1]
    assert codebook_nearest(torch.tensor([9.0, 9.0, 0.0, 0.0]), codebook)[0].tolist() == [1, 1]
    assert codebook_nearest(torch.tensor([0.0, 0.0, 9.0, 9.0]), codebook)[0].tolist() == [0, 0]


def test_a_long_codeword_in_the_same_direction_does_not_beat_a_near_one():
    codebook = torch.tensor([[[100.0, 0.0], [1.0, 1.0]]])  # the larger product belongs to the farther codeword
    assert codebook_nearest(torch.tensor([[1.0, 0.0]]), codebook)[0].tolist() == [[1]]


@pytest.mark.parametrize("shape", [(4096, 8), (4096, 1)], ids=["a group of the full preset", "scalars"])
def test_codewords_find_themselves(shape):
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(4, *shape, generator=generator, dtype=torch.float64)
    chosen = torch.randint(shape[0], (2, 3, 4), generator=generator)
    latents = torch.stack([codebook[g][chosen[..., g]] for g in range(4)], -2).flatten(-2)
    found, codes = codebook_nearest(latents, codebook)
    np.testing.assert_array_equal(found.numpy(), chosen.numpy())
    assert torch.equal(codes, latents)


def test_an_exported_program_runs_at_other_sizes():
    class Nearest(nn.Module):
        def forward(self, latents, codebook):
            return codebook_nearest(latents, codebook)

    generator = np.random.default_rng(5)
    codebook = torch.from_numpy(grid(generator, 3, 7, 2))
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    exported = torch.export.export(Nearest(), (torch.zeros(2, 5, 6).double(), codebook), dynamic_shapes=(sizes, None))
    for batch, tokens in [(2, 5), (3, 11)]:
        latents = grid(generator, batch, tokens, 6)
        found, codes = exported.module()(torch.from_numpy(latents), codebook)
        assert found.dtype == torch.int32
        indices = nearest_in_loops(latents, codebook.numpy())
        np.testing.assert_array_equal(found.numpy(), indices)
        np.testing.assert_array_equal(codes.numpy(), codes_in_loops(indices, codebook.numpy()))
