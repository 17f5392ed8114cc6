"""The codeword with the greatest logit in each group.

    index_g = argmax over k of logits[g*K + k]                       the lowest k on ties
    codes = [codebook_0[index_0], ..., codebook_G-1[index_G-1]]

Operations N G K comparisons; bytes N G K + 2 N G D, times the width of the type, and 4 N G.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from tilewright.kernels.codebook import GATHER, chosen, sizes, store_winners, winners
from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, jit, run, runs_kernels, tl

__all__ = ["FACE", "codebook_from_logits", "codebook_from_logits_reference", "kernel_launches"]


def _body(inputs: frozenset[str]) -> str:
    return f"""
        G = Shape<start = 0, end = 1>(codebook)
        K = Shape<start = 1, end = 2>(codebook)
        D = Shape<start = 2, end = 3>(codebook)
        lead = Shape<start = 0, end = -1>(logits)
        any = Constant<value_ints = [-1]>()
        by_group = Concat<axis = 0>(any, G, K)
        grouped = Reshape(logits, by_group)
        best = ArgMax<axis = 2, keepdims = 0>(grouped)
        {GATHER}
    """


FACE = Face("CodebookFromLogits", ("logits", "codebook"), ("indices:int32", "codes"), _body)


def codebook_from_logits_reference(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in any type, since it only compares."""
    return chosen(logits.unflatten(-1, codebook.shape[:2]).argmax(-1), codebook)


@jit
def _codebook_from_logits_kernel(
    logits_ptr, codebook_ptr, ROWS, indices_ptr, codes_ptr,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    logit_rows = logits_ptr + rows.to(tl.int64)[:, None] * (G * K) + group * K
    best = tl.full((BLOCK_M, BLOCK_K), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + lane
        inside = (rows < ROWS)[:, None] & (k < K)[None, :]
        score = tl.load(logit_rows + k[None, :], mask=inside, other=float("-inf")).to(tl.float32)
        better = score > best  # so that NaN never wins, and among equal scores the first does
        best = tl.where(better, score, best)
        at = tl.where(better, k0, at)
    indices = winners(best, at + lane[None, :])
    store_winners(indices, rows, group, ROWS, codebook_ptr, indices_ptr, codes_ptr, G, K, D, PADDED_D)


def kernel_launches(logits: Tensor, codebook: Tensor, *, arch: int) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches, and the indices and codes that they fill."""
    outputs = _empty(logits, codebook)
    logits, codebook = contiguous(logits, codebook)
    rows, groups = logits.numel() // logits.shape[-1], codebook.shape[0]
    arguments: dict[str, Any] = {"logits_ptr": logits, "codebook_ptr": codebook, "ROWS": rows}
    arguments |= {"indices_ptr": outputs[0], "codes_ptr": outputs[1]}
    constants = sizes(codebook)
    constants |= {"BLOCK_M": 8, "BLOCK_K": 512}
    return [Launch(_codebook_from_logits_kernel, arguments, constants, (ceil_div(rows, 8), groups), 4, 3)], outputs


@triton_op("tilewright::codebook_from_logits", mutates_args={})
def codebook_from_logits(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The winning indices [..., G] (int32) of logits [..., G*K], and their codewords [..., G*D]."""
    if not runs_kernels(logits):
        return codebook_from_logits_reference(logits, codebook)
    return run(*kernel_launches(logits, codebook, arch=arch_of(logits)))


@codebook_from_logits.register_fake
def _empty(logits: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    groups, _, width = codebook.shape
    indices = logits.new_empty((*logits.shape[:-1], groups), dtype=torch.int32)
    return indices, codebook.new_empty((*logits.shape[:-1], groups * width))
