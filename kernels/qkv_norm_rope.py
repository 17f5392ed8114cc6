"""Queries, keys and values of a block: three projections, then RMSNorm of every head and rotary positions.

    p = W_p [x; c] + h_p                         p = q, k, v; c is optional; h_p: bias [H*D] or term [B, N, H*D]
    q, k <- p / sqrt(mean_d p^2 + eps) * norm_p  within a head, if there are norms
    q, k <- (a cos - b sin, b cos + a sin)       pairs (a, b) of a head: neighbours if interleaved, else its halves

x [B, N, X], c [B, N, C] -> q, k, v [B, H, N, D]. The tables [N - prefix, D/2] rotate the last tokens, not the first
ones (class tokens, text). Without tables nothing is rotated.

Operations 6 B N H D (X + C); bytes B N (X + C + 3 H D) + 3 H D (X + C), times the width of the type.
"""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op
from torch.nn.functional import linear

from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch, arch_of, ceil_div, contiguous, fits_a_block, jit, run, runs_kernels, tl

__all__ = ["FACE", "kernel_launches", "qkv_norm_rope", "qkv_norm_rope_reference"]


def _body(inputs: frozenset[str]) -> str:
    lines = [
        "half = Constant<value_ints = [0, 0]>()",
        "heads = Constant<value_int: int = @heads>()",
        "zeroth = Constant<value_ints = [0]>()",
        "heads_dim = Unsqueeze(heads, zeroth)",
        "rest = Constant<value_ints = [-1]>()",
        "by_head = Concat<axis = 0>(half, heads_dim, rest)",
        "tokens = Concat<axis = -1>(x, c)" if "c" in inputs else "tokens = Identity(x)",
    ]
    if "cos" in inputs:
        lines += [
            "all = Shape<start = 1, end = 2>(x)",
            "turned = Shape<start = 0, end = 1>(cos)",
            "prefix = Sub(all, turned)",
            "pairs = Shape<start = 1, end = 2>(cos)",
            "still = Concat<axis = 0>(prefix, pairs)",
            "one = Constant<value_float = 1.0>()",
            "zero = Constant<value_float = 0.0>()",
            "unit = CastLike(one, cos)",
            "none = CastLike(zero, cos)",
            "still_cos = Expand(unit, still)",
            "still_sin = Expand(none, still)",
            "every_cos = Concat<axis = 0>(still_cos, cos)",
            "every_sin = Concat<axis = 0>(still_sin, sin)",
            "batch = Shape<start = 0, end = 1>(x)",
            "table = Concat<axis = 0>(batch, all, pairs)",
            "cosines = Expand(every_cos, table)",
            "sines = Expand(every_sin, table)",
        ]
    for p in "qkv":
        lines += [f"t_{p} = Transpose<perm = [1, 0]>(w{p})", f"m_{p} = MatMul(tokens, t_{p})"]
        last = f"m_{p}"
        if f"h{p}" in inputs:
            lines, last = [*lines, f"b_{p} = Add({last}, h{p})"], f"b_{p}"
        lines += [f"r_{p} = Reshape({last}, by_head)"]
        last, steps = f"r_{p}", [("s", "Transpose<perm = [0, 2, 1, 3]>({})")]
        if p != "v" and "norm_q" in inputs:
            steps += [("n", f"RMSNormalization<axis = -1, epsilon: float = @epsilon>({{}}, norm_{p})")]
        if p != "v" and "cos" in inputs:
            # rotate in the type of the tables, which may be wider
            steps += [("w", "CastLike({}, cosines)")]
            steps += [("e", "RotaryEmbedding<interleaved: int = @interleaved>({}, cosines, sines)")]
            steps += [("x", "CastLike({}, x)")]
        for i, (name, step) in enumerate(steps, 1):
            result = p if i == len(steps) else f"{name}_{p}"
            lines, last = [*lines, f"{result} = {step.format(last)}"], result
    return "\n".join(lines)


FACE = Face(
    "QkvNormRope",
    ("x", "c?", "wq", "wk", "wv", "hq?", "hk?", "hv?", "norm_q?", "norm_k?", "cos?", "sin?"),
    ("q", "k", "v"),
    _body,
    ("heads:int", "epsilon:float", "interleaved:int"),
)


def _rotated(p: Tensor, cos: Tensor | None, sin: Tensor | None, interleaved: bool) -> Tensor:
    """Rotate the last tokens of [B, H, N, D]."""
    if cos is None or sin is None:
        return p
    prefix = p.shape[2] - cos.shape[0]
    still, turned = p[:, :, :prefix], p[:, :, prefix:]
    a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pair = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)
    return torch.cat([still, turned], 2)


def qkv_norm_rope_reference(
    x: Tensor, c: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor,
    hq: Tensor | None = None, hk: Tensor | None = None, hv: Tensor | None = None,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, heads: int, epsilon: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The formula in float32."""
    tokens = x.float() if c is None else torch.cat([x.float(), c.float()], -1)
    results = []
    for w, h, norm, turns in ((wq, hq, norm_q, True), (wk, hk, norm_k, True), (wv, hv, None, False)):
        p = tokens @ w.float().T + (0 if h is None else h.float())
        p = p.unflatten(-1, (heads, -1)).transpose(1, 2)
        if norm is not None:
            p = p / (p.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm.float()
        if turns and cos is not None and sin is not None:
            p = _rotated(p, cos.float(), sin.float(), interleaved)
        results.append(p)
    q, k, v = results
    return q, k, v


@jit
def _qkv_norm_rope_kernel(
    x_ptr, c_ptr, wq_ptr, wk_ptr, wv_ptr, hq_ptr, hk_ptr, hv_ptr, norm_q_ptr, norm_k_ptr, cos_ptr, sin_ptr,
    ROWS, TOKENS, PREFIX, q_ptr, k_ptr, v_ptr,
    X: tl.constexpr, C: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, EPSILON: tl.constexpr,
    INTERLEAVED: tl.constexpr, H_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    OUT: tl.constexpr = HEADS * D
    HERE: tl.constexpr = BLOCK_O // D  # heads in a block
    part = tl.program_id(1) // (OUT // BLOCK_O)  # queries, keys or values
    w_ptr, out_ptr, h_ptr, norm_ptr = wq_ptr, q_ptr, hq_ptr, norm_q_ptr
    if part == 1:
        w_ptr, out_ptr, h_ptr, norm_ptr = wk_ptr, k_ptr, hk_ptr, norm_k_ptr
    if part == 2:
        w_ptr, out_ptr, h_ptr = wv_ptr, v_ptr, hv_ptr
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    outs = tl.program_id(1) % (OUT // BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    # a row past the end reads the first row, and its result is never stored
    from_rows = tl.where(rows < ROWS, rows, 0).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    for k0 in tl.range(0, X, BLOCK_K):
        i = k0 + tl.arange(0, BLOCK_K)
        a = tl.load(x_ptr + from_rows[:, None] * X + i[None, :], mask=i[None, :] < X, other=0.0)
        w = tl.load(w_ptr + outs[None, :] * (X + C) + i[:, None], mask=i[:, None] < X, other=0.0)
        acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if c_ptr is not None:
        for k0 in tl.range(0, C, BLOCK_K):
            i = k0 + tl.arange(0, BLOCK_K)
            a = tl.load(c_ptr + from_rows[:, None] * C + i[None, :], mask=i[None, :] < C, other=0.0)
            w = tl.load(w_ptr + outs[None, :] * (X + C) + X + i[:, None], mask=i[:, None] < C, other=0.0)
            acc = tl.dot(a, w, acc, input_precision=PRECISION)
    if hq_ptr is not None:
        if H_ROWS:
            acc += tl.load(h_ptr + from_rows[:, None] * OUT + outs[None, :]).to(tl.float32)
        else:
            acc += tl.load(h_ptr + outs).to(tl.float32)[None, :]
    if part < 2:
        heads = tl.reshape(acc, (BLOCK_M * HERE, D))
        if norm_q_ptr is not None:
            mean = tl.sum(heads * heads, 1) / D
            norm = tl.load(norm_ptr + tl.arange(0, D)).to(tl.float32)
            heads = heads * tl.rsqrt(mean + EPSILON)[:, None] * norm[None, :]
        if cos_ptr is not None:
            row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M * HERE) // HERE
            token = row % TOKENS - PREFIX
            entry = token[:, None] * (D // 2) + tl.arange(0, D // 2)[None, :]
            cos = tl.load(cos_ptr + entry, mask=token[:, None] >= 0, other=1.0).to(tl.float32)
            sin = tl.load(sin_ptr + entry, mask=token[:, None] >= 0, other=0.0).to(tl.float32)
            if INTERLEAVED:
                a, b = tl.split(tl.reshape(heads, (BLOCK_M * HERE, D // 2, 2)))
                pair = tl.join(a * cos - b * sin, b * cos + a * sin)
            else:
                a, b = tl.split(tl.permute(tl.reshape(heads, (BLOCK_M * HERE, 2, D // 2)), (0, 2, 1)))
                pair = tl.permute(tl.join(a * cos - b * sin, b * cos + a * sin), (0, 2, 1))
            heads = tl.reshape(pair, (BLOCK_M * HERE, D))
        acc = tl.reshape(heads, (BLOCK_M, BLOCK_O))
    by_row = (rows // TOKENS).to(tl.int64) * OUT * TOKENS + rows % TOKENS * D
    by_out = (outs // D).to(tl.int64) * TOKENS * D + outs % D
    tl.store(out_ptr + by_row[:, None] + by_out[None, :], acc.to(out_ptr.dtype.element_ty), mask=rows[:, None] < ROWS)


def kernel_launches(
    x: Tensor, c: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor,
    hq: Tensor | None = None, hk: Tensor | None = None, hv: Tensor | None = None,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, heads: int, epsilon: float = 1e-6, interleaved: bool = False, arch: int,
) -> tuple[list[Launch], tuple[Tensor, Tensor, Tensor]]:  # fmt: skip
    """The launch, and q, k and v, which it fills."""
    outputs = _empty(x, c, wq, wk, wv, heads=heads)
    batch, tokens, channels = x.shape
    by_row = any(h is not None and h.ndim > 1 for h in (hq, hk, hv))
    hq, hk, hv = (h.expand(batch, tokens, -1) if h is not None and by_row else h for h in (hq, hk, hv))
    out, width, wide = wq.shape[0], wq.shape[0] // heads, x.dtype == torch.float32
    m, stages, warps = (32, 2, 4) if wide else (128, 3, 8)
    o = next(o for o in (128, 64, width) if o % width == 0 and out % o == 0)
    names = ("x", "c", "wq", "wk", "wv", "hq", "hk", "hv", "norm_q", "norm_k", "cos", "sin")
    tensors = contiguous(x, c, wq, wk, wv, hq, hk, hv, norm_q, norm_k, cos, sin)
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in zip(names, tensors, strict=True)}
    arguments |= {"ROWS": batch * tokens, "TOKENS": tokens, "PREFIX": 0 if cos is None else tokens - cos.shape[0]}
    arguments |= {f"{name}_ptr": tensor for name, tensor in zip("qkv", outputs, strict=True)}
    constants: dict[str, Any] = {
        "X": channels,
        "C": 0 if c is None else c.shape[-1],
        "HEADS": heads,
        "D": width,
        "EPSILON": epsilon,
        "INTERLEAVED": interleaved,
        "H_ROWS": by_row,
        "PRECISION": "ieee" if wide else None,
        "BLOCK_M": m,
        "BLOCK_O": o,
        "BLOCK_K": 32 if arch < 90 or wide else 64,
    }
    grid = (ceil_div(batch * tokens, m), 3 * out // o)
    return [Launch(_qkv_norm_rope_kernel, arguments, constants, grid, warps, stages)], outputs


def _plain(x, c, weights, terms, norms, cos, sin, heads, epsilon, interleaved):  # type: ignore[no-untyped-def]
    tokens = x if c is None else torch.cat([x, c], -1)
    results = []
    for w, h, norm, turns in zip(weights, terms, (*norms, None), (True, True, False), strict=True):
        bias = h if h is not None and h.ndim == 1 else None
        p = linear(tokens, w, bias)
        p = p if h is bias else p + h
        p = p.unflatten(-1, (heads, -1)).transpose(1, 2)
        if norm is not None:
            p = torch.nn.functional.rms_norm(p, (p.shape[-1],), norm.to(p.dtype), epsilon)
        results.append(_rotated(p, cos, sin, interleaved).to(x.dtype) if turns else p)
    return tuple(results)


@triton_op("tilewright::qkv_norm_rope", mutates_args={})
def qkv_norm_rope(
    x: Tensor, c: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor,
    hq: Tensor | None = None, hk: Tensor | None = None, hv: Tensor | None = None,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, heads: int, epsilon: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, v [B, H, N, D]. hq, hk and hv are optional together, and so are both norms and both tables."""
    if not runs_kernels(x) or not fits_a_block(wq.shape[0] // heads):
        q, k, v = _plain(x, c, (wq, wk, wv), (hq, hk, hv), (norm_q, norm_k), cos, sin, heads, epsilon, interleaved)
        return q.contiguous(), k.contiguous(), v.contiguous()
    arguments = (x, c, wq, wk, wv, hq, hk, hv, norm_q, norm_k, cos, sin)
    return run(*kernel_launches(*arguments, heads=heads, epsilon=epsilon, interleaved=interleaved, arch=arch_of(x)))


@qkv_norm_rope.register_fake
def _empty(
    x: Tensor, c: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor,
    hq: Tensor | None = None, hk: Tensor | None = None, hv: Tensor | None = None,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, heads: int, epsilon: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    batch, tokens, _ = x.shape
    q, k, v = (x.new_empty((batch, heads, tokens, w.shape[0] // heads)) for w in (wq, wk, wv))
    return q, k, v
