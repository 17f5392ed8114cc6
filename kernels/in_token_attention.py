"""Attention over text tokens and image tokens from two sources, without concatenating channels or tokens.

    z = W [x; c] + h                             concat_project
    q, k, v = norm and rope of W_p z + h_p       qkv_norm_rope
    o = attention over [text; z]                 joint_attention

Operations and bytes are the sums of the three parts.
"""

from torch import Tensor

from tilewright.kernels.concat_project import concat_project, concat_project_reference
from tilewright.kernels.joint_attention import joint_attention, joint_attention_reference
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope, qkv_norm_rope_reference

__all__ = ["in_token_attention", "in_token_attention_reference"]

Three = tuple[Tensor, Tensor, Tensor]


def in_token_attention_reference(
    x: Tensor, c: Tensor, embed: tuple[Tensor, Tensor], weights: Three, terms: Three, norms: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor], text: Three, *, heads: int, epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The formula in float32."""
    z = concat_project_reference(x, c, *embed)
    q, k, v = qkv_norm_rope_reference(
        z, None, *weights, *terms, *norms, *tables, heads=heads, epsilon=epsilon, interleaved=True
    )
    return joint_attention_reference(*text, q, k, v)


def in_token_attention(
    x: Tensor, c: Tensor, embed: tuple[Tensor, Tensor], weights: Three, terms: Three, norms: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor], text: Three, *, heads: int, epsilon: float = 1e-6,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over text tokens, `text` is their q, k, v [B, H, T, D], and image tokens x [B, N, X], c [B, N, C]."""
    z = concat_project(x, c, *embed)
    q, k, v = qkv_norm_rope(z, None, *weights, *terms, *norms, *tables, heads=heads, epsilon=epsilon, interleaved=True)
    return joint_attention(*text, q, k, v)
