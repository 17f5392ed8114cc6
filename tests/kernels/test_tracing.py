"""PyTorch's compiler and exporter see every op as one operation whose sizes may change; inference only."""

import os
import shutil

import pytest
import torch
from torch import nn
from torch.export import Dim

from support.cases import CASES, CODEBOOKS, call, maker
from support.textbook import assert_right
from tilewright.kernels.table import KERNELS

pytestmark = pytest.mark.slow

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
OPS = pytest.mark.parametrize("name", [name for name, op in KERNELS.items() if op.kernel_launches is not None])
# of every argument that has them, the axes that change: images, tokens, rows
AXES = {
    "concat_project": {0: (0, 1), 1: (0, 1)},
    "qkv_norm_rope": {0: (0, 1), 10: (0,), 11: (0,)},
    "joint_attention": dict.fromkeys(range(6), (0, 2)),
    **{name: {0: (0,)} for name in CODEBOOKS},
}


@pytest.fixture(autouse=True)
def nothing_compiled():
    """No call is compiled again because another had other sizes."""
    torch.compiler.reset()


class Called(nn.Module):
    """A module that is one call."""

    def __init__(self, name, attributes):
        super().__init__()
        self.run, self.attributes = KERNELS[name].run, attributes

    def forward(self, *arguments):
        return self.run(*arguments, **self.attributes)


@pytest.mark.parametrize(
    "path",
    [
        "concat_project: tails, rows across images",
        "concat_project: c left out",
        "concat_project: h per token, of all images",
        "qkv_norm_rope: a prefix, neighbours",
        "qkv_norm_rope: terms per row, halves",
        "qkv_norm_rope: projections only, halves",
        "joint_attention: images and heads",
        "joint_attention: one token and one",
        "codebook_from_hidden: no bias",
        *(f"{name}: {path}" for name in CODEBOOKS for path in ("a vector", "rows in three dimensions")),
    ],
)
def test_what_an_op_says_of_its_results_is_true(path):
    arguments, attributes = call(CASES[path], maker(torch.bfloat16))  # so that types could be mixed up
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(KERNELS[CASES[path][0]].run, arguments, attributes, test_utils=checks)


@OPS
def test_what_an_op_says_of_results_from_views_is_true(name):
    arguments, attributes = KERNELS[name].cases["small"](maker(torch.float32))
    views = tuple(None if t is None else t.mT.contiguous().mT if t.ndim > 1 else t for t in arguments)
    torch.library.opcheck(KERNELS[name].run, views, attributes, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("name", KERNELS)
def test_a_compiled_call_has_no_break_and_gives_the_same(name):
    arguments, attributes = KERNELS[name].cases["small"](maker(torch.float32))
    called = Called(name, attributes)
    with torch.no_grad():
        found, expected = torch.compile(called, fullgraph=True, backend="aot_eager")(*arguments), called(*arguments)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler (g++, or what CXX names)")
@pytest.mark.parametrize("name", ["in_token_attention", "codebook_nearest", "codebook_from_hidden"])
def test_what_the_compiler_writes_instead_does_what_the_textbook_says(name):
    arguments, attributes = KERNELS[name].cases["small"](maker(torch.float32))
    with torch.no_grad():
        found = torch.compile(Called(name, attributes), fullgraph=True)(*arguments)
    assert_right(name, found, arguments, attributes)


def small(name, more):
    """Arguments of the small case, with so much more along the axes that change; and attributes."""
    made = maker(torch.float32)
    arguments, attributes = KERNELS[name].cases["small"](made)
    sizes = [None if t is None else list(t.shape) for t in arguments]
    for i, axes in AXES[name].items():
        for axis in axes:
            sizes[i][axis] += more
    return tuple(None if of is None else made(*of) for of in sizes), attributes


@OPS
def test_an_exported_program_holds_one_operation_and_takes_other_sizes(name):
    arguments, attributes = small(name, 0)
    changing = [dict.fromkeys(AXES[name].get(i, ()), Dim.DYNAMIC) or None for i in range(len(arguments))]
    program = torch.export.export(Called(name, attributes), arguments, dynamic_shapes=(tuple(changing),))
    for form in (program, program.run_decompositions({})):
        targets = [str(node.target) for node in form.graph.nodes if node.op == "call_function"]
        assert [t for t in targets if t != "<built-in function getitem>"] == [f"tilewright.{name}.default"]
        for more in (0, 3):
            given, _ = small(name, more)
            assert_right(name, form.module()(*given), given, attributes)
