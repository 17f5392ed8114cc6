"""Every op of the project, with the sizes at which the published systems call it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tilewright.kernels import (
    codebook_from_hidden,
    codebook_from_logits,
    codebook_nearest,
    concat_project,
    in_token_attention,
    joint_attention,
    qkv_norm_rope,
)
from tilewright.kernels.face import Face
from tilewright.kernels.jit import Launch

__all__ = ["KERNELS", "Case", "Make", "Op"]

Make = Callable[..., Tensor]  # makes a tensor of these sizes, in the op's type or in `dtype=`
Case = Callable[[Make], tuple[tuple[Any, ...], dict[str, Any]]]  # makes the arguments of a call


@dataclass(frozen=True)
class Op:
    """One operation: its function, reference, kernels, ONNX node and cases."""

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    kernel_launches: Callable[..., tuple[list[Launch], Any]] | None  # none: a composition of others
    face: Face | None
    cases: dict[str, Case]  # "small" for tests, and the published sizes
    longest_sum: Callable[..., int]  # arguments -> the most numbers in one sum
    multiplies: bool = True  # its kernel must use tensor cores
    eight_bit: bool = False  # it accepts float8_e4m3fn


def _concat_project(batch: int, tokens: int, x: int, c: int, weight: int, out: int) -> Case:
    return lambda make: (
        (make(batch, tokens, x), make(batch, tokens, c), make(out, weight), make(out)),
        {},
    )


def _qkv_norm_rope(batch: int, tokens: int, prefix: int, heads: int, width: int, *, flux: bool) -> Case:
    dim = heads * width

    def case(make: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
        tables = [make(tokens - prefix, width // 2, dtype=torch.float32) for _ in range(2)]
        weights = [make(dim, dim) for _ in range(3)]
        terms = [make(dim) for _ in range(3)] if flux else [None] * 3
        norms = [make(width) for _ in range(2)] if flux else [None] * 2
        return (make(batch, tokens, dim), None, *weights, *terms, *norms, *tables), {
            "heads": heads,
            "interleaved": flux,
        }

    return case


def _joint_attention(batch: int, heads: int, text: int, image: int, width: int) -> Case:
    return lambda make: (
        tuple(make(batch, heads, tokens, width) for tokens in (text, image) for _ in range(3)),
        {},
    )


def _in_token_attention(batch: int, tokens: int, text: int, heads: int, width: int) -> Case:
    dim = heads * width

    def case(make: Make) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embed = make(dim, 384), make(dim)
        weights, terms = (tuple(make(*shape) for _ in range(3)) for shape in ((dim, dim), (dim,)))
        tables = tuple(make(tokens, width // 2, dtype=torch.float32) for _ in range(2))
        words = tuple(make(batch, heads, text, width) for _ in range(3))
        x, c = (make(batch, tokens, 64) for _ in range(2))
        return (x, c, embed, weights, terms, (make(width), make(width)), tables, words), {"heads": heads}

    return case


def _codebook(rows: int, groups: int, size: int, width: int, channels: int | None) -> Case:
    first = groups * width if channels is None else channels
    return lambda make: ((make(rows, first), make(groups, size, width)), {})


def _codebook_from_hidden(rows: int, channels: int, groups: int, size: int, width: int) -> Case:
    logits = groups * size
    return lambda make: (
        (make(rows, channels), make(logits, channels), make(logits), make(groups, size, width)),
        {},
    )


KERNELS = {
    op.name: op
    for op in (
        Op(
            "concat_project",
            concat_project.concat_project,
            concat_project.concat_project_reference,
            concat_project.kernel_launches,
            concat_project.FACE,
            {
                "small": _concat_project(2, 70, 40, 24, 80, 96),
                "in-token": _concat_project(1, 14_400, 64, 64, 384, 3072),
                "vicr": _concat_project(1, 8192, 64, 64, 384, 3072),
            },
            lambda x, c, weight, *_: weight.shape[1],
            eight_bit=True,
        ),
        Op(
            "qkv_norm_rope",
            qkv_norm_rope.qkv_norm_rope,
            qkv_norm_rope.qkv_norm_rope_reference,
            qkv_norm_rope.kernel_launches,
            qkv_norm_rope.FACE,
            {
                "small": _qkv_norm_rope(2, 70, 5, 3, 32, flux=True),
                "flux": _qkv_norm_rope(1, 14_400, 0, 24, 128, flux=True),
                "hitoksr": _qkv_norm_rope(1, 1028, 4, 12, 64, flux=False),
            },
            lambda x, c, weight, *_: weight.shape[1],
        ),
        Op(
            "joint_attention",
            joint_attention.joint_attention,
            joint_attention.joint_attention_reference,
            joint_attention.kernel_launches,
            joint_attention.FACE,
            {
                "small": _joint_attention(2, 2, 21, 100, 64),
                "flux": _joint_attention(1, 24, 1241, 14_400, 128),
                "dino": _joint_attention(1, 12, 5, 1024, 64),
            },
            lambda q1, k1, v1, q2, *_: max(q1.shape[3], q1.shape[2] + q2.shape[2]),
        ),
        Op(
            "in_token_attention",
            in_token_attention.in_token_attention,
            in_token_attention.in_token_attention_reference,
            None,
            None,
            {
                "small": _in_token_attention(2, 70, 21, 2, 32),
                "in-token": _in_token_attention(1, 14_400, 1241, 24, 128),
            },
            lambda x, c, embed, weights, terms, norms, tables, text: max(
                embed[0].shape[1], weights[0].shape[1], text[0].shape[2] + x.shape[1]
            ),
        ),
        Op(
            "codebook_nearest",
            codebook_nearest.codebook_nearest,
            codebook_nearest.codebook_nearest_reference,
            codebook_nearest.kernel_launches,
            codebook_nearest.FACE,
            {
                "small": _codebook(150, 4, 500, 8, None),
                "hitoksr": _codebook(16_384, 4, 4096, 8, None),
                "hitoksr-tile": _codebook(1024, 4, 4096, 8, None),
            },
            lambda latents, codebook: codebook.shape[2],
        ),
        Op(
            "codebook_from_logits",
            codebook_from_logits.codebook_from_logits,
            codebook_from_logits.codebook_from_logits_reference,
            codebook_from_logits.kernel_launches,
            codebook_from_logits.FACE,
            {"small": _codebook(150, 4, 500, 8, 2000), "hitoksr": _codebook(16_384, 4, 4096, 8, 16_384)},
            lambda *_: 1,
            multiplies=False,
        ),
        Op(
            "codebook_from_hidden",
            codebook_from_hidden.codebook_from_hidden,
            codebook_from_hidden.codebook_from_hidden_reference,
            codebook_from_hidden.kernel_launches,
            codebook_from_hidden.FACE,
            {
                "small": _codebook_from_hidden(150, 96, 4, 500, 8),
                "hitoksr": _codebook_from_hidden(16_384, 768, 4, 4096, 8),
                "hitoksr-tile": _codebook_from_hidden(1024, 768, 4, 4096, 8),
            },
            lambda hidden, weight, *_: weight.shape[1],
            eight_bit=True,
        ),
    )
}
