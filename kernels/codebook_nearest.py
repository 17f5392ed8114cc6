"""The codeword nearest to a latent in each group, as tokenizers need it.

    index_g = argmin over k of |x_g - codebook_g[k]|^2               the lowest k on ties
            = argmax over k of x_g . codebook_g[k] - |codebook_g[k]|^2 / 2
    codes = [codebook_0[index_0], ..., codebook_G-1[index_G-1]]

Operations 2 N G K D; bytes 2 N G D + G K D, times the width of the type, and 4 N G.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from tilewright.kernels.codebook import GATHER, chosen, sizes, store_winners, winners
from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, jit, run, runs_kernels, tl

__all__ = ["FACE", "codebook_nearest", "codebook_nearest_reference", "kernel_launches"]


def _body(inputs: frozenset[str]) -> str:
    return f"""
        G = Shape<start = 0, end = 1>(codebook)
        K = Shape<start = 1, end = 2>(codebook)
        D = Shape<start = 2, end = 3>(codebook)
        lead = Shape<start = 0, end = -1>(latents)
        any = Constant<value_ints = [-1]>()
        by_group = Concat<axis = 0>(any, G, D)
        grouped = Reshape(latents, by_group)
        x = Transpose<perm = [1, 0, 2]>(grouped)
        transposed = Transpose<perm = [0, 2, 1]>(codebook)
        products = MatMul(x, transposed)
        squares = ReduceSumSquare<keepdims = 0>(codebook, any)
        two = Constant<value_float = 2.0>()
        divisor = CastLike(two, codebook)
        half_norms = Div(squares, divisor)
        middle = Constant<value_ints = [1]>()
        norms = Unsqueeze(half_norms, middle)
        distances = Sub(norms, products)
        nearest = ArgMin<axis = 2, keepdims = 0>(distances)
        best = Transpose<perm = [1, 0]>(nearest)
        {GATHER}
    """


FACE = Face("CodebookNearest", ("latents", "codebook"), ("indices:int32", "codes"), _body)


def codebook_nearest_reference(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in float32, with every distance computed."""
    groups, _, width = codebook.shape
    apart = latents.float().unflatten(-1, (groups, 1, width)) - codebook.float()  # [..., G, K, D]
    return chosen(apart.square().sum(-1).argmin(-1), codebook)


@jit
def _codebook_nearest_kernel(
    latents_ptr, codebook_ptr, ROWS, indices_ptr, codes_ptr,
    G: tl.constexpr, K: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d, lane = tl.arange(0, PADDED_D), tl.arange(0, BLOCK_K)
    latent_rows = latents_ptr + rows.to(tl.int64)[:, None] * (G * D) + group * D + d[None, :]
    x = tl.load(latent_rows, mask=(rows < ROWS)[:, None] & (d < D)[None, :], other=0.0)
    best = tl.full((BLOCK_M, BLOCK_K), float("-inf"), tl.float32)
    at = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    for k0 in tl.range(0, K, BLOCK_K):
        k = k0 + lane
        inside = (d < D)[:, None] & (k < K)[None, :]
        code = tl.load(codebook_ptr + (group * K + k)[None, :] * D + d[:, None], mask=inside, other=0.0)
        wide = code.to(tl.float32)
        score = tl.dot(x, code, input_precision=PRECISION) - tl.sum(wide * wide, 0)[None, :] / 2
        score = tl.where((k < K)[None, :], score, float("-inf"))
        better = score > best  # so that NaN never wins, and among equal scores the first does
        best = tl.where(better, score, best)
        at = tl.where(better, k0, at)
    indices = winners(best, at + lane[None, :])
    store_winners(indices, rows, group, ROWS, codebook_ptr, indices_ptr, codes_ptr, G, K, D, PADDED_D)


def kernel_launches(latents: Tensor, codebook: Tensor, *, arch: int) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launches, and the indices and codes that they fill."""
    outputs = _empty(latents, codebook)
    latents, codebook = contiguous(latents, codebook)
    rows, groups = latents.numel() // latents.shape[-1], codebook.shape[0]
    arguments: dict[str, Any] = {"latents_ptr": latents, "codebook_ptr": codebook, "ROWS": rows}
    arguments |= {"indices_ptr": outputs[0], "codes_ptr": outputs[1]}
    constants = sizes(codebook)
    wide = latents.dtype == torch.float32
    constants |= {"PRECISION": "ieee" if wide else None, "BLOCK_M": 64, "BLOCK_K": 64}
    return [Launch(_codebook_nearest_kernel, arguments, constants, (ceil_div(rows, 64), groups), 4, 2)], outputs


@triton_op("tilewright::codebook_nearest", mutates_args={})
def codebook_nearest(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Indices [..., G] (int32) of the codewords nearest to latents [..., G*D] in codebooks [G, K, D]; the codewords."""
    groups, _, width = codebook.shape
    if not runs_kernels(latents) or width > 128:  # wider codewords would spill
        grouped = latents.unflatten(-1, (groups, width))
        half_norms = codebook.square().sum(-1) / 2  # [G, K]
        return chosen((half_norms - torch.einsum("...gd,gkd->...gk", grouped, codebook)).argmin(-1), codebook)
    return run(*kernel_launches(latents, codebook, arch=arch_of(latents)))


@codebook_nearest.register_fake
def _empty(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    indices = latents.new_empty((*latents.shape[:-1], codebook.shape[0]), dtype=torch.int32)
    return indices, codebook.new_empty(latents.shape)
