"""Codebook lookup from hidden states: head, per-group argmax, gather and concatenation as one operation.

    logits = W h + b                                  h [..., C], W [G*K, C]
    index_g = argmax over k of logits[g*K + k]        the lowest k on ties
    codes = [codebook_0[index_0], ..., codebook_G-1[index_G-1]]

Codebooks are one tensor [G, K, D], so that all groups are one gather.
"""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

__all__ = ["codebook_from_hidden", "codebook_from_indices"]


def codebook_from_indices(indices: Tensor, codebook: Tensor) -> Tensor:
    """The codewords of indices [..., G] from codebooks [G, K, D], concatenated to [..., G*D]."""
    groups, size, width = codebook.shape
    flat = indices.long() + torch.arange(0, groups * size, size, device=indices.device)
    return embedding(flat, codebook.reshape(groups * size, width)).flatten(-2)


def codebook_from_hidden(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, codebook: Tensor
) -> tuple[Tensor, Tensor]:
    """The winning indices [..., G] (int32) and their codewords [..., G*D] for hidden states [..., C]."""
    logits = linear(hidden, weight, bias).unflatten(-1, codebook.shape[:2])
    indices = logits.argmax(-1)
    return indices.to(torch.int32), codebook_from_indices(indices, codebook)
