"""Nearest codeword of each group: what a tokenizer does to its encoder's latents.

index_g = argmin over k of |z_g - codebook_g[k]|^2     the lowest k on ties
        = argmin over k of |codebook_g[k]|^2 / 2 - z_g . codebook_g[k]
"""

import torch
from torch import Tensor

__all__ = ["codebook_nearest"]


def codebook_nearest(latents: Tensor, codebook: Tensor) -> Tensor:
    """Indices [..., G] (int32) of the codewords nearest to latents [..., G*D] in codebooks [G, K, D]."""
    groups, _, width = codebook.shape
    grouped = latents.unflatten(-1, (groups, width))  # [..., G, D]
    half_norms = codebook.square().sum(-1) / 2  # [G, K]
    return (half_norms - torch.einsum("...gd,gkd->...gk", grouped, codebook)).argmin(-1).to(torch.int32)
