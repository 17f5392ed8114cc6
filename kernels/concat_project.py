"""Projection of channel-concatenated tokens, without concatenating them.

    y = W [x; c] + h = W_x x + W_c c + h        W_x: the first columns of W, W_c: the next ones

x [B, N, X] and c [B, N, C] have the same number of tokens. h is added to their projection: a bias [O], which may
contain the projection of a constant third source, or a term [B, N, O] that was computed before, if c is left out.
With 8-bit x, c and W, `scale` is the product of their scales and multiplies the matrix product. y has the type of h.

Operations 2 B N O (X + C); bytes B N (X + C + O) + O (X + C), times the width of the type.
"""

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn.functional import linear

from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, jit, run, runs_kernels, tl

__all__ = ["FACE", "concat_project", "concat_project_reference", "kernel_launches"]


def _body(inputs: frozenset[str]) -> str:
    return f"""
        one = Constant<value_ints = [1]>()
        zero = Constant<value_ints = [0]>()
        tokens = {"Concat<axis = -1>(x, c)" if "c" in inputs else "Identity(x)"}
        joined = Shape<start = -1>(tokens)
        columns = Slice(weight, zero, joined, one)
        transposed = Transpose<perm = [1, 0]>(columns)
        product = MatMul(tokens, transposed)
        y = Add(product, h)
    """


FACE = Face("ConcatProject", ("x", "c?", "weight", "h"), ("y",), _body)


def concat_project_reference(
    x: Tensor, c: Tensor | None, weight: Tensor, h: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The formula in float32."""
    tokens = x.float() if c is None else torch.cat([x.float(), c.float()], -1)
    product = tokens @ weight.float()[:, : tokens.shape[-1]].T
    return (product if scale is None else product * scale) + h.float()


@jit
def _concat_project_kernel(
    x_ptr, c_ptr, weight_ptr, h_ptr, scale_ptr, ROWS, y_ptr,
    OUT: tl.constexpr, K: tl.constexpr, X: tl.constexpr, C: tl.constexpr, H_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    in_rows, in_outs = rows < ROWS, outs < OUT
    # a row past the end reads the first row, and its result is never stored
    from_rows = tl.where(in_rows, rows, 0).to(tl.int64)
    from_outs = tl.where(in_outs, outs, 0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for k0 in tl.range(0, X, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(x_ptr + from_rows[:, None] * X + k[None, :], mask=k[None, :] < X, other=0.0)
        w = tl.load(weight_ptr + from_outs[None, :] * K + k[:, None], mask=k[:, None] < X, other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if c_ptr is not None:
        for k0 in tl.range(0, C, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            a = tl.load(c_ptr + from_rows[:, None] * C + k[None, :], mask=k[None, :] < C, other=0.0)
            w = tl.load(weight_ptr + from_outs[None, :] * K + X + k[:, None], mask=k[:, None] < C, other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr)
    if H_ROWS:
        h = tl.load(h_ptr + from_rows[:, None] * OUT + outs[None, :], mask=in_outs[None, :], other=0.0)
        acc += h.to(tl.float32)
    else:
        acc += tl.load(h_ptr + outs, mask=in_outs, other=0.0).to(tl.float32)[None, :]
    places = y_ptr + rows.to(tl.int64)[:, None] * OUT + outs[None, :]
    tl.store(places, acc.to(y_ptr.dtype.element_ty), mask=in_rows[:, None] & in_outs[None, :])


def kernel_launches(
    x: Tensor, c: Tensor | None, weight: Tensor, h: Tensor, scale: Tensor | None = None, *, arch: int
) -> tuple[list[Launch], Tensor]:
    """The launch, and y, which it fills."""
    y = _empty(x, c, weight, h)
    x, c, weight, h, scale = contiguous(x, c, weight, h if h.ndim == 1 else h.expand(y.shape), scale)
    rows, out, wide = x.numel() // x.shape[-1], weight.shape[0], x.dtype == torch.float32
    m, o, warps = (64, 64, 4) if wide else (128, 128, 8)
    arguments = {"x_ptr": x, "c_ptr": c, "weight_ptr": weight, "h_ptr": h, "scale_ptr": scale, "ROWS": rows, "y_ptr": y}
    constants = {
        "OUT": out,
        "K": weight.shape[1],
        "X": x.shape[-1],
        "C": 0 if c is None else c.shape[-1],
        "H_ROWS": h.ndim > 1,
        "PRECISION": "ieee" if wide else None,
        "BLOCK_M": m,
        "BLOCK_O": o,
        "BLOCK_K": 32 if arch < 90 or wide else 64,
    }
    grid = (ceil_div(rows, m), ceil_div(out, o))
    return [Launch(_concat_project_kernel, arguments, constants, grid, warps, 3)], y


@triton_op("tilewright::concat_project", mutates_args={})
def concat_project(x: Tensor, c: Tensor | None, weight: Tensor, h: Tensor, scale: Tensor | None = None) -> Tensor:
    """y [B, N, O] in the type of h. Of the weight [O, >= X + C] only the first X + C columns are read."""
    if not runs_kernels(x):
        weight = weight.to(h.dtype)
        y = linear(x.to(h.dtype), weight[:, : x.shape[-1]])
        if c is not None:
            y = y + linear(c.to(h.dtype), weight[:, x.shape[-1] : x.shape[-1] + c.shape[-1]])
        return (y if scale is None else y * scale.to(h.dtype)) + h
    return run(*kernel_launches(x, c, weight, h, scale, arch=arch_of(x)))


@concat_project.register_fake
def _empty(x: Tensor, c: Tensor | None, weight: Tensor, h: Tensor, scale: Tensor | None = None) -> Tensor:
    return h.new_empty((*x.shape[:-1], weight.shape[0]))
