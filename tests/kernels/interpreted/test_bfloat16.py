"""The repaired interpreter computes with bfloat16 as PyTorch does."""

import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, negative_ptr, less_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(sum_ptr + i, a + b)
    tl.store(product_ptr + i, a * b)
    tl.store(negative_ptr + i, -a)
    tl.store(less_ptr + i, a < b)


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    place = i[:, None] * N + i[None, :]
    c = tl.dot(tl.load(a_ptr + place), tl.load(b_ptr + place))
    tl.store(c_ptr + place, c.to(tl.bfloat16))


@triton.jit
def _round_kernel(a_ptr, b_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(b_ptr + i, tl.load(a_ptr + i).to(tl.bfloat16))


def test_sums_products_signs_and_comparisons():
    a, b = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    results = [torch.empty_like(a) for _ in range(3)]
    less = torch.empty(64, dtype=torch.bool)
    _arithmetic_kernel[(1,)](a, b, *results, less, N=64)
    for found, expected in zip([*results, less], (a + b, a * b, -a, a < b), strict=True):
        assert torch.equal(found, expected)


def test_dots():
    a, b = torch.randint(-3, 4, (2, 16, 16), generator=torch.Generator().manual_seed(0)).bfloat16()
    c = torch.empty_like(a)
    _dot_kernel[(1,)](a, b, c, N=16)
    assert torch.equal(c, a @ b)  # exact: sums of 16 products of at most 9


@pytest.mark.parametrize("scale", [1.0, 1e30, 1e-38, 0.0], ids=["usual", "large", "subnormal", "zero"])
def test_float32_is_rounded_to_the_nearest_even(scale):
    a = scale * torch.randn(1024, generator=torch.Generator().manual_seed(0))
    # halfway between two neighbours, upward and downward; what is no number; the greatest, which rounds to infinity
    a[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, torch.finfo(torch.float32).max])
    b = torch.empty(1024, dtype=torch.bfloat16)
    _round_kernel[(1,)](a, b, N=1024)
    torch.testing.assert_close(b, a.bfloat16(), rtol=0, atol=0, equal_nan=True)
