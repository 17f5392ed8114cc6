"""Plain PyTorch code in the place of each op, eager and compiled."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention

from tilewright.kernels.codebook import chosen
from tilewright.kernels.sample import EIGHT_BIT, Sample

Results = tuple[Tensor, Tensor]


def concat_project(x: Tensor, c: Tensor, weight: Tensor, h: Tensor) -> Tensor:
    return linear(torch.cat([x, c], -1), weight[:, : x.shape[-1] + c.shape[-1]], h)


def qkv_norm_rope(
    x: Tensor, _: None, wq: Tensor, wk: Tensor, wv: Tensor, hq: Any, hk: Any, hv: Any, norm_q: Any, norm_k: Any,
    cos: Tensor, sin: Tensor, *, heads: int, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = (linear(x, w, h).unflatten(-1, (heads, -1)) for w, h in ((wq, hq), (wk, hk), (wv, hv)))
    if norm_q is not None:
        q, k = (rms_norm(p, p.shape[-1:], norm, 1e-6) for p, norm in ((q, norm_q), (k, norm_k)))
    q, k = (turned(p, cos[:, None], sin[:, None], interleaved) for p in (q, k))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def turned(p: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the last tokens of [B, N, H, D] by tables [N', 1, D/2], in float32 as diffusers and transformers do."""
    prefix = p.shape[1] - cos.shape[0]
    moved = p[:, prefix:].float()
    if interleaved:
        a, b = moved.unflatten(-1, (-1, 2)).unbind(-1)
        moved = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = moved.chunk(2, -1)
        moved = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([p[:, :prefix], moved.to(p.dtype)], 1) if prefix else moved.to(p.dtype)


def joint_attention(*tensors: Tensor) -> Results:
    q, k, v = (torch.cat(pair, 2) for pair in zip(tensors[:3], tensors[3:], strict=True))
    tokens = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return tokens[:, : tensors[0].shape[2]], tokens[:, tensors[0].shape[2] :]


def by_cudnn(*joined: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(*joined)


def in_token_attention(
    x: Tensor, c: Tensor, embed: Any, weights: Any, terms: Any, norms: Any, tables: Any, text: Any, *, heads: int
) -> Results:
    z = concat_project(x, c, *embed)
    image = qkv_norm_rope(z, None, *weights, *terms, *norms, *tables, heads=heads, interleaved=True)
    return joint_attention(*text, *image)


def codebook_nearest(latents: Tensor, codebook: Tensor) -> Results:
    groups, _, width = codebook.shape
    products = torch.einsum("ngd,gkd->ngk", latents.unflatten(-1, (groups, width)), codebook)
    return chosen((codebook.square().sum(-1) / 2 - products).argmin(-1), codebook)


def codebook_from_logits(logits: Tensor, codebook: Tensor) -> Results:
    return chosen(logits.unflatten(-1, codebook.shape[:2]).argmax(-1), codebook)


def codebook_from_hidden(hidden: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor) -> Results:
    return codebook_from_logits(linear(hidden, weight, bias), codebook)


def linear_of_8_bits(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
    one = torch.ones_like(scale)
    return torch._scaled_mm(x, weight.T, scale, one, bias=bias, out_dtype=bias.dtype, use_fast_accum=True)


def concat_project_of_8_bits(x: Tensor, c: Tensor, weight: Tensor, h: Tensor, *, scale: Tensor) -> Tensor:
    tokens = torch.cat([x.view(torch.uint8), c.view(torch.uint8)], -1).view(x.dtype)
    return linear_of_8_bits(tokens.flatten(0, -2), weight, h, scale).unflatten(0, x.shape[:-1])


def codebook_from_hidden_of_8_bits(
    hidden: Tensor, weight: Tensor, bias: Tensor, codebook: Tensor, *, scale: Tensor
) -> Results:
    return codebook_from_logits(linear_of_8_bits(hidden, weight, bias, scale), codebook)


PLAIN: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        concat_project,
        qkv_norm_rope,
        joint_attention,
        in_token_attention,
        codebook_nearest,
        codebook_from_logits,
        codebook_from_hidden,
    )
}
PLAIN_OF_8_BITS: dict[str, Callable[..., Any]] = {
    "concat_project": concat_project_of_8_bits,
    "codebook_from_hidden": codebook_from_hidden_of_8_bits,
}


def contenders(call: Sample, *, compile: bool) -> dict[str, Callable[[], Any]]:
    """The contenders of a call by their names; ours is the first."""
    name, arguments, options = call.op.name, call.arguments, call.options
    plain, plain_arguments = PLAIN[name], arguments
    if call.dtype == EIGHT_BIT:
        plain = PLAIN_OF_8_BITS[name]
        if name == "concat_project":  # PyTorch's product of 8 bits needs a contiguous weight
            x, c, weight, h = arguments
            plain_arguments = (x, c, weight[:, : x.shape[-1] + c.shape[-1]].contiguous(), h)
    runs = {"ours": partial(call.op.run, *arguments, **options), "eager": partial(plain, *plain_arguments, **options)}
    if compile:
        torch._dynamo.reset()
        compiled = torch.compile(plain, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
        runs["compiled"] = partial(compiled, *plain_arguments, **options)
    if name == "joint_attention":
        joined = [torch.cat(pair, 2) for pair in zip(arguments[:3], arguments[3:], strict=True)]
        runs["sdpa, joined before"] = partial(scaled_dot_product_attention, *joined)
        runs["sdpa of cuDNN, joined before"] = partial(by_cudnn, *joined)
    return runs
