"""Sizes that between them take every path of the kernels, and the calls of the ops at these sizes.

A block is what a program computes at once. In 16 bits and in float32 it holds

    concat_project          128 x 128 results, 32 channels at a time (64 from sm_90 on); 64 x 64
    qkv_norm_rope           128 rows, 32 rows; times 128 or 64 channels, where whole heads fill them, or one head
    joint_attention         128 queries and 64 keys (32 where heads are wide); 32 and 32
    codebook_nearest        64 rows, 64 codes
    codebook_from_logits    8 rows, 512 codes
    codebook_from_hidden    64 rows and 128 codes, 64 channels at a time; 64 and 64, 32. From two blocks of codes on,
                            programs share them
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Made = Callable[..., Tensor]  # a tensor of these sizes in the test's type, or in `dtype=`
Call = tuple[tuple[Any, ...], dict[str, Any]]  # arguments and attributes of an op
Case = tuple[str, tuple[Any, ...], dict[str, Any]]  # an op, and what its function below is called with

CONCAT_PROJECT: dict[str, tuple[Any, ...]] = {
    "one number": ((1, 1), 1, 1, 1),
    "one row, all below a block": ((1, 1), 3, 2, 5),
    "whole blocks": ((1, 128), 64, 32, 128),
    "one more than whole blocks": ((1, 129), 65, 33, 129),
    "tails, rows across images": ((2, 70), 40, 24, 133),
    "c left out": ((2, 9), 40, None, 30),
    "rows without images": ((9,), 40, 8, 30),
    "images in two dimensions": ((2, 3, 5), 40, 8, 30),
    "a vector": ((), 40, 8, 30),
    "no rows": ((2, 0), 4, 4, 8),
    "h per row": ((2, 9), 40, 24, 133, (2, 9, 133)),
    "h per row, c left out": ((2, 9), 40, None, 133, (2, 9, 133)),
    "h per token, of all images": ((2, 9), 40, 24, 30, (9, 30)),
    "h per image": ((2, 9), 40, 24, 30, (2, 1, 30)),
    "columns to spare": ((2, 9), 40, 24, 30, None, 7),
}

QKV_NORM_ROPE: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "one token of one head": ((1, 1, 1, 16), {}),
    "blocks of 128 channels, two heads": ((1, 5, 2, 64), {}),
    "blocks of 128 channels, eight heads": ((1, 5, 8, 16), {}),
    "blocks of 64 channels": ((1, 5, 3, 64), {}),
    "blocks of a head": ((1, 5, 3, 32), {}),
    "a head of 128": ((1, 5, 1, 128), {}),
    "whole blocks of rows": ((2, 64, 2, 32), {}),
    "one row more": ((1, 129, 2, 32), {}),
    "tails, rows across images": ((2, 70, 2, 32), {"x": 40, "c": 25}),
    "c": ((2, 9, 2, 32), {"x": 33, "c": 33}),
    "no terms": ((2, 9, 2, 32), {"terms": None}),
    "terms per row": ((2, 9, 2, 32), {"terms": "row", "c": 8}),
    "terms per token, of all images": ((2, 9, 2, 32), {"terms": "token"}),
    "no norms": ((2, 9, 2, 32), {"norms": False}),
    "no tables": ((2, 9, 2, 32), {"prefix": None}),
    "projections only": ((2, 9, 2, 32), {"terms": None, "norms": False, "prefix": None}),
    "a prefix": ((2, 9, 2, 32), {"prefix": 4}),
    "a prefix of a block and more": ((2, 70, 2, 32), {"prefix": 40, "norms": False}),
    "all is prefix": ((2, 9, 2, 32), {"prefix": 9}),
    "no tokens": ((2, 0, 2, 32), {}),
}
QKV_NORM_ROPE_PLAIN: dict[str, tuple[tuple[int, int, int, int], dict[str, Any]]] = {
    "heads of two": ((2, 9, 3, 2), {"c": 5, "prefix": 2}),
    "heads too narrow": ((2, 9, 3, 8), {"c": 5, "prefix": 2}),
    "heads too wide": ((1, 5, 2, 256), {}),
    "heads of no power of two": ((2, 9, 3, 24), {"c": 5, "prefix": 2}),
    "one head of no power of two": ((1, 9, 1, 96), {}),
}

JOINT_ATTENTION = {
    "one token and one": (1, 1, 1, 1, 16),
    "both below a block": (1, 1, 5, 9, 16),
    "whole blocks of both": (1, 1, 64, 128, 32),
    "whole blocks of the text, a tail of the image": (1, 1, 64, 70, 32),
    "a tail of the text, whole blocks of the image": (1, 1, 70, 64, 32),
    "one more than whole blocks of both": (1, 1, 65, 129, 32),
    "text below a block, image above": (1, 1, 3, 150, 64),
    "text above a block, image below": (1, 1, 150, 3, 64),
    "images and heads": (2, 3, 21, 40, 16),
    "a head of 128": (1, 2, 21, 70, 128),
    "no images": (0, 2, 3, 4, 16),
}
JOINT_ATTENTION_PLAIN = {
    "heads too narrow": (2, 2, 5, 9, 8),
    "heads too wide": (1, 2, 5, 9, 256),
    "heads of no power of two": (2, 2, 5, 9, 24),
    "one head of one image": (1, 1, 5, 9, 8),
    "no text": (2, 2, 0, 9, 32),
    "no image": (2, 2, 5, 0, 32),
    "no text, one image": (1, 2, 0, 9, 32),
}

CODEBOOK: dict[str, tuple[Any, ...]] = {
    "one of all": ((1,), 1, 1, 1),
    "a vector": ((), 2, 5, 3),
    "all below a block": ((3,), 2, 5, 3),
    "whole blocks": ((64,), 1, 512, 16),
    "one more row and code than whole blocks": ((65,), 1, 513, 8),
    "one row less, two codes less": ((63,), 2, 126, 4),
    "a codeword wider than a dot's least": ((2, 5), 2, 70, 20),
    "many groups": ((2, 3), 7, 9, 2),
    "rows in three dimensions": ((2, 3, 4), 2, 9, 2),
    "no rows": ((0,), 2, 5, 3),
}
CODEBOOK_FROM_HIDDEN: dict[str, tuple[Any, ...]] = {
    "one channel": ((9,), 2, 40, 3, 1),
    "whole blocks of channels": ((9,), 2, 40, 3, 64),
    "tails of channels": ((9,), 2, 40, 3, 130),
    "no bias": ((9,), 2, 40, 3, 65, False),
}


def concat_project(
    made: Made, rows: tuple[int, ...], x: int, c: int | None, out: int, h: tuple[int, ...] | None = None, spare: int = 0
) -> Call:
    """x and c of a width, or none; sizes of h; columns of the weight that nothing reads."""
    weight = made(out, x + (c or 0) + spare)
    return (made(*rows, x), None if c is None else made(*rows, c), weight, made(*(h or (out,)))), {}


def qkv_norm_rope(
    made: Made, batch: int, tokens: int, heads: int, width: int,
    *, interleaved: bool = False, x: int = 24, c: int | None = None, terms: str | None = "bias", norms: bool = True,
    prefix: int | None = 0,
) -> Call:  # fmt: skip
    """`terms` are a bias, by row, by token or none; no prefix leaves the tables out."""
    dim = heads * width
    sizes = {"bias": (dim,), "row": (batch, tokens, dim), "token": (tokens, dim)}
    weights = [made(dim, x + (c or 0)) for _ in range(3)]
    h = [made(*sizes[terms]) if terms else None for _ in range(3)]
    norm = [made(width) if norms else None for _ in range(2)]
    angles = None if prefix is None else made(tokens - prefix, width // 2, dtype=torch.float32)
    tables = (None, None) if angles is None else (angles.cos(), angles.sin())
    sources = made(batch, tokens, x), None if c is None else made(batch, tokens, c)
    return (*sources, *weights, *h, *norm, *tables), {"heads": heads, "interleaved": interleaved}


def joint_attention(made: Made, batch: int, heads: int, text: int, image: int, width: int) -> Call:
    """q, k, v of the text, then of the image."""
    return tuple(made(batch, heads, tokens, width) for tokens in (text, image) for _ in range(3)), {}


def codebook_nearest(made: Made, rows: tuple[int, ...], groups: int, size: int, width: int) -> Call:
    """In all three the codebook comes last."""
    return (made(*rows, groups * width), made(groups, size, width)), {}


def codebook_from_logits(made: Made, rows: tuple[int, ...], groups: int, size: int, width: int) -> Call:
    """By the same sizes."""
    return (made(*rows, groups * size), made(groups, size, width)), {}


def codebook_from_hidden(
    made: Made, rows: tuple[int, ...], groups: int, size: int, width: int, channels: int = 20, bias: bool = True
) -> Call:
    """And channels of the hidden states."""
    head = made(groups * size, channels), made(groups * size) if bias else None
    return (made(*rows, channels), *head, made(groups, size, width)), {}


CODEBOOKS = {
    "codebook_nearest": codebook_nearest,
    "codebook_from_logits": codebook_from_logits,
    "codebook_from_hidden": codebook_from_hidden,
}
ONE_CHANNEL = {
    "codebook_nearest": {"width": 1},
    "codebook_from_logits": {"width": 1},
    "codebook_from_hidden": {"width": 1, "channels": 1},
}  # so that of integers many are equal
CALLS: dict[str, Callable[..., Call]] = CODEBOOKS | {
    "concat_project": concat_project,
    "qkv_norm_rope": qkv_norm_rope,
    "joint_attention": joint_attention,
}


def _both_ways(turned: dict[str, Any]) -> dict[str, Case]:
    return {
        f"qkv_norm_rope: {path}, {pairs}": ("qkv_norm_rope", sizes, more | {"interleaved": pairs == "neighbours"})
        for path, (sizes, more) in turned.items()
        for pairs in ("neighbours", "halves")
    }


def _of(name: str, sizes: dict[str, Any]) -> dict[str, Case]:
    return {f"{name}: {path}": (name, of, {}) for path, of in sizes.items()}


CASES: dict[str, Case] = _of("concat_project", CONCAT_PROJECT) | _both_ways(QKV_NORM_ROPE)
CASES |= _of("joint_attention", JOINT_ATTENTION) | _of("codebook_nearest", CODEBOOK)
CASES |= _of("codebook_from_logits", CODEBOOK) | _of("codebook_from_hidden", CODEBOOK | CODEBOOK_FROM_HIDDEN)
PLAIN_CASES = _both_ways(QKV_NORM_ROPE_PLAIN) | _of("joint_attention", JOINT_ATTENTION_PLAIN)  # what no kernel can take


def maker(dtype: torch.dtype, seed: int = 0) -> Made:
    """Makes normal random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes, dtype=dtype: torch.randn(sizes, generator=generator).to(dtype)


def grid(dtype: torch.dtype, seed: int = 0) -> Made:
    """Makes -1, 0 and 1: a few of their products add up exactly in every type, and many scores are equal."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *sizes, dtype=dtype: torch.randint(-1, 2, sizes, generator=generator).to(dtype)


def call(case: Case, made: Made) -> Call:
    """The call of a case."""
    name, sizes, more = case
    return CALLS[name](made, *sizes, **more)
