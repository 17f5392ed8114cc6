"""The ops as a textbook has them, in the type of what they are given.

In float64 that is the truth. In a shorter type it is what plain PyTorch makes of it; a kernel may be twice as far off,
and by what another order of its sums does: how far off plain PyTorch is depends on the CPU, and may be nearly nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def concat_project(
    x: Tensor, c: Tensor | None, weight: Tensor, h: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Two products of halves of the weight, and h."""
    y = torch.einsum("...i,oi->...o", x, weight[:, : x.shape[-1]])
    if c is not None:
        y = y + torch.einsum("...i,oi->...o", c, weight[:, x.shape[-1] : x.shape[-1] + c.shape[-1]])
    return ((y if scale is None else y * scale) + h,)


def qkv_norm_rope(
    x: Tensor, c: Tensor | None, wq: Tensor, wk: Tensor, wv: Tensor,
    hq: Tensor | None = None, hk: Tensor | None = None, hv: Tensor | None = None,
    norm_q: Tensor | None = None, norm_k: Tensor | None = None, cos: Tensor | None = None, sin: Tensor | None = None,
    *, heads: int, epsilon: float = 1e-6, interleaved: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Head by head; a pair of channels is a complex number that is multiplied by cos + i sin."""
    results = []
    for w, h, norm, turns in ((wq, hq, norm_q, True), (wk, hk, norm_k, True), (wv, hv, None, False)):
        (p,) = concat_project(x, c, w, torch.zeros_like(w[:, 0]) if h is None else h)
        by_head = []
        for part in p.chunk(heads, -1):
            if norm is not None:
                part = part / (part.square().mean(-1, keepdim=True) + epsilon).sqrt() * norm
            if turns and cos is not None:
                still = part.shape[1] - len(cos)
                part = torch.cat([part[:, :still], turned(part[:, still:], cos, sin, interleaved)], 1)
            by_head.append(part)
        results.append(torch.stack(by_head, 1).to(x.dtype))
    return tuple(results)


def turned(p: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The pairs of channels of [B, N, D], each turned by its angle."""
    half = p.shape[-1] // 2
    first, second = (p[..., 0::2], p[..., 1::2]) if interleaved else (p[..., :half], p[..., half:])
    wide = torch.promote_types(p.dtype, torch.float32)  # there are no complex numbers of the short types
    pairs = torch.complex(first.to(wide), second.to(wide)) * torch.complex(cos.to(wide), sin.to(wide))
    together = torch.empty_like(p, dtype=wide)
    if interleaved:
        together[..., 0::2], together[..., 1::2] = pairs.real, pairs.imag
    else:
        together[..., :half], together[..., half:] = pairs.real, pairs.imag
    return together


def joint_attention(q1: Tensor, k1: Tensor, v1: Tensor, q2: Tensor, k2: Tensor, v2: Tensor) -> tuple[Tensor, ...]:
    """Each segment's queries against all keys, head by head."""
    results = []
    for q in (q1, q2):
        heads = []
        for head in range(q.shape[1]):
            keys, values = (torch.cat([a[:, head], b[:, head]], 1) for a, b in ((k1, k2), (v1, v2)))
            score = torch.einsum("bmd,bnd->bmn", q[:, head], keys) / q.shape[-1] ** 0.5
            share = (score - score.amax(-1, keepdim=True)).exp()
            heads.append(torch.einsum("bmn,bnd->bmd", share / share.sum(-1, keepdim=True), values))
        results.append(torch.cat(heads, -1))
    return tuple(results)


def in_token_attention(
    x: Tensor, c: Tensor, embed: Any, weights: Any, terms: Any, norms: Any, tables: Any, text: Any,
    *, heads: int, epsilon: float = 1e-6,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The three above, one after the other."""
    (z,) = concat_project(x, c, *embed)
    given = (z, None, *weights, *terms, *norms, *tables)
    return joint_attention(*text, *qkv_norm_rope(*given, heads=heads, epsilon=epsilon, interleaved=True))


def codebook_nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Half the squared distance to every codeword [..., G, K], negative."""
    groups, _, width = codebook.shape
    apart = latents.unflatten(-1, (groups, 1, width)) - codebook
    return -apart.square().sum(-1) / 2


def codebook_from_logits(logits: Tensor, codebook: Tensor) -> Tensor:
    """The logits by group."""
    return logits.unflatten(-1, codebook.shape[:2])


def codebook_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor, scale: Tensor | None = None
) -> Tensor:
    """The head's logits by group."""
    bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
    return concat_project(hidden, None, weight, bias, scale)[0].unflatten(-1, codebook.shape[:2])


DENSE = {
    "concat_project": concat_project,
    "qkv_norm_rope": qkv_norm_rope,
    "joint_attention": joint_attention,
    "in_token_attention": in_token_attention,
}
SCORES = {
    "codebook_nearest": codebook_nearest,
    "codebook_from_logits": codebook_from_logits,
    "codebook_from_hidden": codebook_from_hidden,
}

SUMS: dict[str, Callable[..., int]] = {
    "concat_project": lambda x, c, weight, *_: weight.shape[1],
    "qkv_norm_rope": lambda x, c, weight, *_: weight.shape[1],
    "joint_attention": lambda q1, k1, v1, q2, *_: max(q1.shape[3], q1.shape[2] + q2.shape[2]),
    "in_token_attention": lambda x, c, embed, weights, terms, norms, tables, text: max(
        embed[0].shape[1], weights[0].shape[1], text[0].shape[2] + x.shape[1]
    ),
    "codebook_nearest": lambda latents, codebook: codebook.shape[2],
    "codebook_from_logits": lambda *_: 0,
    "codebook_from_hidden": lambda hidden, weight, *_: weight.shape[1],
}  # how many numbers the longest adds


def in_another_order(name: str, arguments: tuple[Any, ...], dtype: torch.dtype) -> float:
    """How far off sums may be, as a share of the largest: random roundings seldom add up to twice the root of n."""
    wide = torch.promote_types(dtype, torch.float32)  # no sum is in a shorter type
    return 2 * torch.finfo(wide).eps * SUMS[name](*arguments) ** 0.5


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Arguments in another type, also those in tuples."""
    if isinstance(value, tuple):
        return tuple(cast(entry, dtype) for entry in value)
    return value.to(dtype) if isinstance(value, Tensor) else value


def assert_right(
    name: str,
    found: Any,
    arguments: tuple[Any, ...],
    attributes: dict[str, Any] | None = None,
    *,
    sums_in: torch.dtype | None = None,
) -> None:
    """Either of the next two."""
    if name in DENSE:
        assert_as_exact(name, found, arguments, attributes)
    else:
        assert_best(name, found, arguments, sums_in=sums_in or arguments[0].dtype)


def assert_as_exact(
    name: str, found: Tensor | Sequence[Tensor], arguments: tuple[Any, ...], attributes: dict[str, Any] | None = None
) -> None:
    """Results are off by twice what plain PyTorch in their type is, and by their own and their sums' rounding."""
    found = (found,) if isinstance(found, Tensor) else found
    exact = DENSE[name](*cast(arguments, torch.float64), **attributes or {})
    # nothing multiplies 8 bits; widened they are the same numbers
    widened = [cast(a, found[0].dtype) if is_eight_bit(a) else a for a in arguments]
    plain = DENSE[name](*widened, **attributes or {})
    assert len(found) == len(exact)
    for result, truth, usual in zip(found, exact, plain, strict=True):
        assert result.shape == truth.shape and result.is_contiguous()
        assert result.dtype == usual.dtype and result.isfinite().all()
        if result.numel():
            roundings = 100 if result.dtype == torch.float64 else 2  # there the truth is no better
            rounding = roundings * torch.finfo(result.dtype).eps + in_another_order(name, arguments, result.dtype)
            allowed = 2 * (usual.double() - truth).abs().max() + rounding * truth.abs().max()
            assert (result.double() - truth).abs().max() <= allowed


def is_eight_bit(value: Any) -> bool:
    """Whether it is a tensor of a type that has no arithmetic."""
    return isinstance(value, Tensor) and value.dtype == torch.float8_e4m3fn


def assert_best(name: str, found: tuple[Tensor, Tensor], arguments: tuple[Any, ...], *, sums_in: torch.dtype) -> None:
    """No codeword scores above the chosen ones by more than sums are off in a type; the codes are the chosen ones."""
    exact = SCORES[name](*cast(arguments, torch.float64))
    usual = SCORES[name](*cast(arguments, sums_in)).double()
    assert_codes(found, arguments[3 if name == "codebook_from_hidden" else 1])
    chosen = exact.gather(-1, found[0].long().unsqueeze(-1)).squeeze(-1)
    if chosen.numel():
        rounding = 2 * torch.finfo(sums_in).eps + in_another_order(name, arguments, sums_in)
        allowed = 2 * (usual - exact).abs().max() + rounding * exact.abs().max()
        assert (exact.amax(-1) - chosen).max() <= allowed


def assert_codes(found: tuple[Tensor, Tensor], codebook: Tensor) -> None:
    """Indices are within the codebook, and the codes are its rows."""
    indices, codes = found
    groups, size, width = codebook.shape
    assert indices.dtype == torch.int32 and codes.dtype == codebook.dtype
    assert indices.is_contiguous() and codes.is_contiguous()
    assert ((indices >= 0) & (indices < size)).all()
    for group in range(groups):
        rows = codebook[group][indices[..., group].long()]
        assert torch.equal(codes[..., group * width : (group + 1) * width], rows)


def lowest_best(scores: Tensor) -> Tensor:
    """The first of the greatest scores of each group."""
    best = torch.zeros(scores.shape[:-1], dtype=torch.int32)
    greatest = scores[..., 0].clone()
    for k in range(1, scores.shape[-1]):
        better = scores[..., k] > greatest
        best[better], greatest[better] = k, scores[..., k][better]
    return best
