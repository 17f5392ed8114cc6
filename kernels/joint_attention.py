"""Attention over two segments of tokens (text and image, or prefix and patches) in separate buffers.

    o = softmax(q k^T / sqrt(D)) v      with q = [q1; q2], k = [k1; k2], v = [v1; v2] along the tokens, never joined

q1, k1, v1 [B, H, T, D] and q2, k2, v2 [B, H, N, D] -> o1 [B, T, H*D] and o2 [B, N, H*D]. Heads are side by side, as
the next projections read them.

Operations 4 B H (T + N)^2 D; bytes 4 B H (T + N) D, times the width of the type.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn.functional import scaled_dot_product_attention

from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, fits_a_block, jit, run, runs_kernels, tl

__all__ = ["FACE", "joint_attention", "joint_attention_reference", "kernel_launches"]

LOG2_E = 1.4426950408889634


def _body(inputs: frozenset[str]) -> str:
    return """
        q = Concat<axis = 2>(q1, q2)
        k = Concat<axis = 2>(k1, k2)
        v = Concat<axis = 2>(v1, v2)
        seen = Attention(q, k, v)
        by_token = Transpose<perm = [0, 2, 1, 3]>(seen)
        side_by_side = Constant<value_ints = [0, 0, -1]>()
        tokens = Reshape(by_token, side_by_side)
        T = Shape<start = 2, end = 3>(q1)
        N = Shape<start = 2, end = 3>(q2)
        lengths = Concat<axis = 0>(T, N)
        o1, o2 = Split<axis = 1>(tokens, lengths)
    """


FACE = Face("JointAttention", ("q1", "k1", "v1", "q2", "k2", "v2"), ("o1", "o2"), _body)


def joint_attention_reference(
    q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor
) -> tuple[Tensor, Tensor]:
    """The formula in float32."""
    q, k, v = (torch.cat(pair, 2).float() for pair in ((q1, q2), (k1, k2), (v1, v2)))
    weights = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)
    tokens = (weights @ v).transpose(1, 2).flatten(2)
    return tokens[:, : q1.shape[2]], tokens[:, q1.shape[2] :]


@jit
def _attend(
    acc, top, total, q, k1_ptr, v1_ptr, k2_ptr, v2_ptr, T, N, SCALE: tl.constexpr,
    D: tl.constexpr, BLOCK_N: tl.constexpr, TAILS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Continue the running softmax over the full blocks of both segments' keys, or with TAILS over their last part."""
    d = tl.arange(0, D)
    blocks1, blocks2 = T // BLOCK_N, N // BLOCK_N
    # one loop for both segments: two loops would double the code and the registers for addresses
    first = 1 if TAILS else blocks1
    for i in tl.range(0, 2 if TAILS else blocks1 + blocks2):
        in_first = i < first
        k_ptr, v_ptr = tl.where(in_first, k1_ptr, k2_ptr), tl.where(in_first, v1_ptr, v2_ptr)
        if TAILS:
            n = tl.where(in_first, blocks1, blocks2) * BLOCK_N + tl.arange(0, BLOCK_N)
            inside = n < tl.where(in_first, T, N)
            k = tl.load(k_ptr + n[None, :] * D + d[:, None], mask=inside[None, :], other=0.0)
            v = tl.load(v_ptr + n[:, None] * D + d[None, :], mask=inside[:, None], other=0.0)
            score = tl.dot(q, k, input_precision=PRECISION)
            score = tl.where(inside[None, :], score, float("-inf"))
        else:
            n = (i - tl.where(in_first, 0, blocks1)) * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.load(k_ptr + n[None, :] * D + d[:, None])
            v = tl.load(v_ptr + n[:, None] * D + d[None, :])
            score = tl.dot(q, k, input_precision=PRECISION)
        higher = tl.maximum(top, tl.max(score, 1) * SCALE)
        weight = tl.exp2(score * SCALE - higher[:, None])
        fade = tl.exp2(top - higher)
        total = total * fade + tl.sum(weight, 1)
        acc = tl.dot(weight.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)
        top = higher
    return acc, top, total


@jit
def _joint_attention_kernel(
    q1_ptr, k1_ptr, v1_ptr, q2_ptr, k2_ptr, v2_ptr, T, N, o1_ptr, o2_ptr,
    HEADS: tl.constexpr, D: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    block, batch_head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q_ptr, o_ptr, length = q1_ptr, o1_ptr, T
    if block >= tl.cdiv(T, BLOCK_M):
        q_ptr, o_ptr, length = q2_ptr, o2_ptr, N
        block -= tl.cdiv(T, BLOCK_M)
    rows, d = block * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D)
    # a row past the end reads the first row, and its result is never stored
    from_rows = tl.where(rows < length, rows, 0)
    q = tl.load(q_ptr + batch_head * length * D + from_rows[:, None] * D + d[None, :])
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    k1, v1 = k1_ptr + batch_head * T * D, v1_ptr + batch_head * T * D
    k2, v2 = k2_ptr + batch_head * N * D, v2_ptr + batch_head * N * D
    acc, top, total = _attend(acc, top, total, q, k1, v1, k2, v2, T, N, SCALE, D, BLOCK_N, False, PRECISION)
    acc, top, total = _attend(acc, top, total, q, k1, v1, k2, v2, T, N, SCALE, D, BLOCK_N, True, PRECISION)
    batch, head = batch_head // HEADS, batch_head % HEADS
    token = (batch * length + rows) * HEADS + head
    attended = acc / total[:, None]
    tl.store(o_ptr + token[:, None] * D + d[None, :], attended.to(o_ptr.dtype.element_ty), mask=rows[:, None] < length)


def kernel_launches(
    q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor, *, arch: int
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:
    """The launch, and o1 and o2, which it fills."""
    o1, o2 = _empty(q1, k1, v1, q2, k2, v2)
    batch, heads, text, width = q1.shape
    image = q2.shape[2]
    m, n, warps, stages = _tile(q1.dtype, width, arch)
    names = ("q1_ptr", "k1_ptr", "v1_ptr", "q2_ptr", "k2_ptr", "v2_ptr")
    arguments: dict[str, Any] = dict(zip(names, contiguous(q1, k1, v1, q2, k2, v2), strict=True))
    arguments |= {"T": text, "N": image, "o1_ptr": o1, "o2_ptr": o2}
    constants: dict[str, Any] = {"HEADS": heads, "D": width, "SCALE": LOG2_E * width**-0.5}
    constants |= {"PRECISION": "ieee" if q1.dtype == torch.float32 else None, "BLOCK_M": m, "BLOCK_N": n}
    grid = (ceil_div(text, m) + ceil_div(image, m), batch * heads)
    return [Launch(_joint_attention_kernel, arguments, constants, grid, warps, stages)], (o1, o2)


def _tile(dtype: torch.dtype, width: int, arch: int) -> tuple[int, int, int, int]:
    """Queries and keys of a block, then warps and stages."""
    if dtype == torch.float32:
        return 32, 32, 4, 1
    if arch in (90, 100):
        return 128, 64, 8, 2 if arch == 100 and width <= 64 else 3
    return 128, 64 if width <= 64 else 32, 8, 2


@triton_op("tilewright::joint_attention", mutates_args={})
def joint_attention(q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention's results for both segments: o1 [B, T, H*D] and o2 [B, N, H*D]."""
    if not runs_kernels(q1) or not fits_a_block(q1.shape[-1]) or 0 in (q1.shape[2], q2.shape[2]):
        q, k, v = (torch.cat(pair, 2) for pair in ((q1, q2), (k1, k2), (v1, v2)))
        tokens = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return tokens[:, : q1.shape[2]].clone(), tokens[:, q1.shape[2] :].clone()
    return run(*kernel_launches(q1, k1, v1, q2, k2, v2, arch=arch_of(q1)))


@joint_attention.register_fake
def _empty(q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, Tensor]:
    batch, heads, text, width = q1.shape
    o1 = q1.new_empty((batch, text, heads * width))
    return o1, q2.new_empty((batch, q2.shape[2], heads * width))
