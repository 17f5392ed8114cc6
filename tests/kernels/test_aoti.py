"""A network of the ops compiled ahead of time runs in Python, and in C++ without Python, as it runs in PyTorch."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import cpp_extension

from support.cases import maker
from tilewright.kernels.codebook_from_hidden import codebook_from_hidden
from tilewright.kernels.concat_project import concat_project
from tilewright.kernels.joint_attention import joint_attention
from tilewright.kernels.qkv_norm_rope import qkv_norm_rope

COMPILER = shutil.which(os.environ.get("CXX", "g++"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler (g++, or what CXX names)"),
]

HEADS, WIDTH, LONGEST = 2, 16, 64
DIM = HEADS * WIDTH
CHANNELS = 12
SIZES = {
    "embed": (DIM, CHANNELS), "term": (DIM,),
    **{f"w{p}": (DIM, DIM) for p in "qkv"}, **{f"h{p}": (DIM,) for p in "qkv"}, "norm_q": (WIDTH,), "norm_k": (WIDTH,),
    "angles": (LONGEST, WIDTH // 2), **{f"text_{p}": (1, HEADS, 5, WIDTH) for p in "qkv"},
    "head": (3 * 20, DIM), "bias": (3 * 20,), "codebook": (3, 20, 4),
}  # fmt: skip


class Network(nn.Module):
    """Tokens and their channels beside them, a block that also sees a text, and codes."""

    def __init__(self) -> None:
        super().__init__()
        made = maker(torch.float32)
        for name, sizes in SIZES.items():
            self.register_buffer(name, made(*sizes) / (sizes[-1] ** 0.5 if len(sizes) == 2 else 1))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = concat_project(x[..., :8], x[..., 8:], self.embed, self.term)
        weights, terms = (self.wq, self.wk, self.wv), (self.hq, self.hk, self.hv)
        tables = self.angles.cos()[: x.shape[1]], self.angles.sin()[: x.shape[1]]
        norms = self.norm_q, self.norm_k
        image = qkv_norm_rope(z, None, *weights, *terms, *norms, *tables, heads=HEADS, interleaved=True)
        text = (t.expand(x.shape[0], -1, -1, -1) for t in (self.text_q, self.text_k, self.text_v))
        o1, o2 = joint_attention(*text, *image)
        return o1, o2, *codebook_from_hidden(o2, self.head, self.bias, self.codebook)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network's package, for any number of images and tokens."""
    path = tmp_path_factory.mktemp("aoti") / "network.pt2"
    sizes = {0: Dim("images", min=1, max=8), 1: Dim("tokens", min=1, max=LONGEST)}
    with torch.no_grad():
        program = torch.export.export(Network(), (torch.zeros(2, 9, CHANNELS),), dynamic_shapes=(sizes,))
        ours = [str(node.target) for node in program.graph.nodes if "tilewright" in str(node.target)]
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    assert len(ours) == 4
    return path


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program that runs a package."""
    path = tmp_path_factory.mktemp("aoti") / "main"
    folders = cpp_extension.library_paths()
    words = [str(COMPILER), "-std=c++20", str(Path(__file__).parent / "aoti" / "main.cc"), "-o", str(path)]
    words += [f"-isystem{folder}" for folder in cpp_extension.include_paths()]
    words += [word for folder in folders for word in (f"-L{folder}", f"-Wl,-rpath,{folder}")]
    built = subprocess.run([*words, "-ltorch", "-ltorch_cpu", "-lc10"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return path


TAKEN = pytest.mark.parametrize(("images", "tokens"), [(2, 9), (1, 1), (3, 17)], ids=["as exported", "one", "more"])


def assert_same(found: list[Tensor], expected: tuple[Tensor, ...]) -> None:
    """Both segments of tokens, the indices and the codes."""
    for result, eager in zip(found, expected, strict=True):
        torch.testing.assert_close(result, eager, rtol=0, atol=1e-5)


@TAKEN
def test_a_package_runs_in_python_as_the_network_does(images, tokens, package):
    x = maker(torch.float32, 1)(images, tokens, CHANNELS)
    assert_same(torch._inductor.aoti_load_package(str(package))(x), Network()(x))


@TAKEN
def test_a_package_runs_without_python_as_the_network_does(images, tokens, package, program, tmp_path):
    x = maker(torch.float32, 1)(images, tokens, CHANNELS)
    (tmp_path / "input").write_bytes(x.numpy().tobytes())
    words = [program, package, tmp_path / "input", tmp_path / "output", *map(str, x.shape)]
    done = subprocess.run(words, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    expected = Network()(x)
    numbers = torch.frombuffer(bytearray((tmp_path / "output").read_bytes()), dtype=torch.float32)
    parts = numbers.split([t.numel() for t in expected])
    assert_same([part.view(t.shape).to(t.dtype) for part, t in zip(parts, expected, strict=True)], expected)
