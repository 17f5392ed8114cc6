"""Shared by the three codebook ops: all codebooks are one tensor [G, K, D], so one gather reads all groups."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from tilewright.kernels.jit import jit, tl

__all__ = ["GATHER", "chosen", "codewords", "sizes", "store_winners", "winners"]

# makes indices and codes of `best` [rows, G] (int64), the best index of each row and group; `lead`: the rows' shape
GATHER = """
    minus_one = Constant<value_ints = [-1]>()
    grid = Concat<axis = 0>(lead, G)
    grouped_best = Reshape(best, grid)
    indices = Cast<to = 6>(grouped_best)
    zero = Constant<value_int = 0>()
    size = Squeeze(K)
    all = Mul(G, K)
    end = Squeeze(all)
    starts = Range(zero, end, size)
    flat = Add(grouped_best, starts)
    book = Concat<axis = 0>(minus_one, D)
    rows_of_codes = Reshape(codebook, book)
    gathered = Gather<axis = 0>(rows_of_codes, flat)
    width = Mul(G, D)
    wide = Concat<axis = 0>(lead, width)
    codes = Reshape(gathered, wide)
"""


def codewords(indices: Tensor, codebook: Tensor) -> Tensor:
    """The codewords [..., G*D] of indices [..., G], those of all groups side by side."""
    groups, size, width = codebook.shape
    flat = indices.long() + torch.arange(0, groups * size, size, device=indices.device)
    return embedding(flat, codebook.reshape(groups * size, width)).flatten(-2)


def chosen(best: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The best indices [..., G] as int32, and their codewords."""
    return best.to(torch.int32), codewords(best, codebook)


def sizes(codebook: Tensor) -> dict[str, Any]:
    """The constants that every codebook kernel needs."""
    groups, size, width = codebook.shape
    return {"G": groups, "K": size, "D": width, "PADDED_D": max(16, 1 << (width - 1).bit_length())}


@jit
def winners(best, at):
    """For each row the index `at` of its greatest score; among equal scores the lowest index."""
    top = tl.max(best, 1)
    return tl.min(tl.where(best == top[:, None], at, 2147483647), 1)


@jit
def store_winners(
    at, rows, group, ROWS, codebook_ptr, indices_ptr, codes_ptr,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """Store the best indices of a group, and their codewords."""
    rows = rows.to(tl.int64)
    tl.store(indices_ptr + rows * G + group, at, mask=rows < ROWS)
    d = tl.arange(0, PADDED_D)
    inside = (rows < ROWS)[:, None] & (d < D)[None, :]
    codes = tl.load(codebook_ptr + (group * K + at)[:, None] * D + d[None, :], mask=inside, other=0.0)
    tl.store(codes_ptr + rows[:, None] * (G * D) + group * D + d[None, :], codes, mask=inside)
