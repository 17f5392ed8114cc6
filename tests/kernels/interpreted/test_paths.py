"""Every path of every kernel."""

import pytest
import torch

from support.cases import CASES, PLAIN_CASES, call, maker
from support.launched import launched
from support.textbook import assert_right
from tilewright.kernels.jit import run
from tilewright.kernels.table import KERNELS

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@DTYPES
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_kernel_does_what_the_textbook_says(case, dtype):
    name = case[0]
    arguments, attributes = call(case, maker(dtype))
    found, kernels = launched(KERNELS[name].run, *arguments, **attributes)
    assert kernels[0] == f"_{name}_kernel" and set(kernels[1:]) <= {"_best_of_shares_kernel"}
    assert_right(name, found, arguments, attributes, sums_in=torch.float32)


@DTYPES
@pytest.mark.parametrize("case", PLAIN_CASES.values(), ids=PLAIN_CASES)
def test_what_no_kernel_can_take_is_computed_without(case, dtype):
    name = case[0]
    arguments, attributes = call(case, maker(dtype))
    found, kernels = launched(KERNELS[name].run, *arguments, **attributes)
    assert kernels == []
    assert_right(name, found, arguments, attributes)


OTHER_BLOCKS = {
    "concat_project": ("concat_project", ((2, 70), 100, 30, 133), {}),
    "qkv_norm_rope": ("qkv_norm_rope", (2, 70, 2, 64), {"x": 100, "c": 30, "prefix": 5}),
    "joint_attention": ("joint_attention", (1, 1, 70, 130, 64), {}),
    "joint_attention, wide": ("joint_attention", (1, 1, 70, 130, 128), {}),
    "codebook_nearest": ("codebook_nearest", ((70,), 2, 200, 3), {}),
    "codebook_from_logits": ("codebook_from_logits", ((70,), 2, 600, 3), {}),
    "codebook_from_hidden": ("codebook_from_hidden", ((70,), 2, 300, 3, 100), {}),
}


@pytest.mark.parametrize("arch", [90, 100, 120])
@pytest.mark.parametrize("case", OTHER_BLOCKS.values(), ids=OTHER_BLOCKS)
def test_the_blocks_of_other_gpus_give_the_same(case, arch):
    name = case[0]
    arguments, attributes = call(case, maker(torch.bfloat16))
    found, kernels = launched(run, *KERNELS[name].kernel_launches(*arguments, **attributes, arch=arch))
    assert kernels[0] == f"_{name}_kernel"
    assert_right(name, found, arguments, attributes, sums_in=torch.float32)
