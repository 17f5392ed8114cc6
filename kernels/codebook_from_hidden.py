"""Codebook lookup from hidden states: head, per-group argmax, gather and concatenation as one operation.

    logits = W h + b                                                 h [..., C], W [G*K, C]
    index_g = argmax over k of logits[g*K + k]                       the lowest k on ties
    codes = [codebook_0[index_0], ..., codebook_G-1[index_G-1]]

The logits, 16,384 for each token of HiTokSR, are never stored in memory. With 8-bit h and W, `scale` is the product of
their scales and multiplies W h.

Operations 2 N C G K; bytes N C + G K C + 2 N G D, times the width of the type, and 4 N G.
"""

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn.functional import linear

from tilewright.kernels.codebook import GATHER, chosen, sizes, store_winners, winners
from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, jit, run, runs_kernels, tl

__all__ = ["FACE", "codebook_from_hidden", "codebook_from_hidden_reference", "kernel_launches"]

FULL = 256  # programs that keep a GPU busy; if there are fewer, several share the codes of a group


def _body(inputs: frozenset[str]) -> str:
    bias = "bias" if "bias" in inputs else '""'
    return f"""
        G = Shape<start = 0, end = 1>(codebook)
        K = Shape<start = 1, end = 2>(codebook)
        D = Shape<start = 2, end = 3>(codebook)
        lead = Shape<start = 0, end = -1>(hidden)
        C = Shape<start = -1>(hidden)
        any = Constant<value_ints = [-1]>()
        flat_shape = Concat<axis = 0>(any, C)
        rows = Reshape(hidden, flat_shape)
        logits = Gemm<transB = 1>(rows, weight, {bias})
        by_group = Concat<axis = 0>(any, G, K)
        grouped = Reshape(logits, by_group)
        best = ArgMax<axis = 2, keepdims = 0>(grouped)
        {GATHER}
    """


FACE = Face("CodebookFromHidden", ("hidden", "weight", "bias?", "codebook"), ("indices:int32", "codes"), _body)


def codebook_from_hidden_reference(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula in float32."""
    logits = hidden.float() @ weight.float().T
    logits = logits if scale is None else logits * scale
    logits = logits if bias is None else logits + bias.float()
    return chosen(logits.unflatten(-1, codebook.shape[:2]).argmax(-1), codebook)


@jit
def _codebook_from_hidden_kernel(
    hidden_ptr, weight_ptr, bias_ptr, codebook_ptr, scale_ptr, ROWS, indices_ptr, codes_ptr, scores_ptr, places_ptr,
    C: tl.constexpr, G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SHARE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    group, part = tl.program_id(1), tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    lane = tl.arange(0, BLOCK_K)
    # a row past the end reads the first row, and its result is never stored
    hidden_rows = hidden_ptr + tl.where(rows < ROWS, rows, 0).to(tl.int64)[:, None] * C
    best = tl.full((BLOCK_M, BLOCK_K), float("-inf"), tl.float32)
    at = tl.full((BLOCK_M, BLOCK_K), 0, tl.int32) + part * SHARE
    for k0 in tl.range(part * SHARE, part * SHARE + SHARE, BLOCK_K):
        k = k0 + lane
        weight_rows = weight_ptr + (group * K + tl.where(k < K, k, 0)).to(tl.int64)[None, :] * C
        score = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for c0 in tl.range(0, C, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            h = tl.load(hidden_rows + c[None, :], mask=(c < C)[None, :], other=0.0)
            w = tl.load(weight_rows + c[:, None], mask=(c < C)[:, None], other=0.0)
            score = tl.dot(h, w, score, input_precision=PRECISION)
        if scale_ptr is not None:
            score *= tl.load(scale_ptr)
        if bias_ptr is not None:
            score += tl.load(bias_ptr + group * K + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
        # compare lane by lane: reducing a row in every block of codes would cost as much as the comparison
        better = (score > best) & (k < K)[None, :]
        best = tl.where(better, score, best)
        at = tl.where(better, k0, at)
    indices = winners(best, at + lane[None, :])
    if scores_ptr is None:
        store_winners(indices, rows, group, ROWS, codebook_ptr, indices_ptr, codes_ptr, G, K, D, PADDED_D)
    else:
        place = (part * ROWS + rows) * G + group
        tl.store(scores_ptr + place, tl.max(best, 1), mask=rows < ROWS)
        tl.store(places_ptr + place, indices, mask=rows < ROWS)


@jit
def _best_of_shares_kernel(
    scores_ptr, places_ptr, codebook_ptr, ROWS, indices_ptr, codes_ptr,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SHARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (tl.arange(0, SHARES)[None, :] * ROWS + rows[:, None]) * G + group
    score = tl.load(scores_ptr + place, mask=(rows < ROWS)[:, None], other=float("-inf"))
    indices = winners(score, tl.load(places_ptr + place, mask=(rows < ROWS)[:, None], other=0))
    store_winners(indices, rows, group, ROWS, codebook_ptr, indices_ptr, codes_ptr, G, K, D, PADDED_D)


def kernel_launches(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor | None = None,
    *, arch: int, shares: int | None = None,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:  # fmt: skip
    """The launches, and the indices and codes that they fill. Several programs may share the codes of a group."""
    outputs = indices, codes = _empty(hidden, weight, bias, codebook)
    hidden, weight, bias, codebook, scale = contiguous(hidden, weight, bias, codebook, scale)
    rows, groups = hidden.numel() // hidden.shape[-1], codebook.shape[0]
    m, k, c, warps, stages = _tile(hidden.dtype, arch)
    if shares is None:
        shares = _shares(ceil_div(rows, m) * groups, codebook.shape[1] // k)
    scores = None if shares == 1 else indices.new_empty((shares, rows, groups), dtype=torch.float32)
    places = None if shares == 1 else indices.new_empty((shares, rows, groups))
    arguments = {"hidden_ptr": hidden, "weight_ptr": weight, "bias_ptr": bias, "codebook_ptr": codebook}
    arguments |= {"scale_ptr": scale, "ROWS": rows, "indices_ptr": indices, "codes_ptr": codes}
    arguments |= {"scores_ptr": scores, "places_ptr": places}
    constants = sizes(codebook) | {
        "C": hidden.shape[-1],
        "SHARE": ceil_div(ceil_div(codebook.shape[1], shares), k) * k,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else None,
        "BLOCK_M": m,
        "BLOCK_K": k,
        "BLOCK_C": c,
    }
    grid = (ceil_div(rows, m), groups, shares)
    launches = [Launch(_codebook_from_hidden_kernel, arguments, constants, grid, warps, stages)]
    if shares > 1:
        arguments = {"scores_ptr": scores, "places_ptr": places, "codebook_ptr": codebook, "ROWS": rows}
        arguments |= {"indices_ptr": indices, "codes_ptr": codes}
        constants = sizes(codebook) | {"SHARES": shares, "BLOCK_M": 64}
        launches.append(Launch(_best_of_shares_kernel, arguments, constants, (ceil_div(rows, 64), groups), 4, 1))
    return launches, outputs


def _tile(dtype: torch.dtype, arch: int) -> tuple[int, int, int, int, int]:
    """Rows, codes and channels of a block, then warps and stages."""
    if dtype == torch.float32:
        return 64, 64, 32, 4, 2
    return (128, 128 if arch == 90 else 64, 64, 8, 3) if arch in (90, 100) else (64, 128, 64, 8, 2)


def _shares(programs: int, blocks: int) -> int:
    shares = 1
    while programs * shares * 2 <= FULL and shares * 2 <= blocks:
        shares *= 2
    return shares


@triton_op("tilewright::codebook_from_hidden", mutates_args={})
def codebook_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The winning indices [..., G] (int32) and their codewords [..., G*D] for hidden states [..., C]."""
    if not runs_kernels(hidden):
        if scale is not None or hidden.element_size() == 1:
            return codebook_from_hidden_reference(hidden, weight, bias, codebook, scale)
        return chosen(linear(hidden, weight, bias).unflatten(-1, codebook.shape[:2]).argmax(-1), codebook)
    return run(*kernel_launches(hidden, weight, bias, codebook, scale, arch=arch_of(hidden)))


@codebook_from_hidden.register_fake
def _empty(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    groups, _, width = codebook.shape
    indices = hidden.new_empty((*hidden.shape[:-1], groups), dtype=torch.int32)
    return indices, codebook.new_empty((*hidden.shape[:-1], groups * width))
