"""What runs on a GPU only: float32 products are float32, and odd sizes are those of the interpreted tests."""

from collections.abc import Iterator

import pytest
import torch

from support.bundles import build, bundle, kernels, staged, weights_dir
from tilewright.kernels.jit import INTERPRETED

__all__ = ["build", "bundle", "kernels", "staged", "weights_dir"]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skips without one; references are never computed in TF32, and a test leaves no memory behind."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    if INTERPRETED:
        pytest.skip("this process interprets kernels (TRITON_INTERPRET=1)")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
    torch.cuda.empty_cache()
