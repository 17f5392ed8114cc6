"""A folder of cubins against the machine code in it."""

import re
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from tilewright.kernels import cubins
from tilewright.kernels.jit import INTERPRETED, triton
from tilewright.kernels.table import KERNELS

compiles = pytest.mark.skipif(triton is None or INTERPRETED, reason="only Triton's compiler makes cubins")
OPS = [op for op in KERNELS.values() if op.face is not None]
WORDS = "op=CodebookNearest arch=90 inputs=float16,float16 G=2 K=64 D=8"


def made(usual: torch.dtype, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype or usual, device="meta")


def entries(folder: Path) -> list[dict[str, str]]:
    header, *lines = (folder / cubins.MANIFEST).read_text().splitlines()
    assert header == "tilewright cubins 1"
    return [dict(word.split("=", 1) for word in line.split()) for line in lines]


def disassembled(*arguments: str | Path) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
@pytest.mark.parametrize("dtype", cubins.TYPES.values(), ids=str)
def test_the_words_of_a_call_lead_back_to_its_kernel(op, dtype):
    for case in op.cases.values():
        arguments, options = case(partial(made, dtype))
        words = cubins.words_of(op, arguments, options, 90)
        found, arch = cubins.launch_for(words)
        shares = {"shares": 1} if op.name == "codebook_from_hidden" else {}
        (asked,), _ = op.kernel_launches(*arguments, **options, **shares, arch=90)
        assert (arch, found.warps, found.stages, found.kernel) == (90, asked.warps, asked.stages, asked.kernel)
        epsilon = asked.constants.get("EPSILON")
        assert found.constants == asked.constants | ({} if epsilon is None else {"EPSILON": pytest.approx(epsilon)})
        for name, argument in asked.arguments.items():
            assert getattr(found.arguments[name], "dtype", None) == getattr(argument, "dtype", None), name


@compiles
def test_the_manifest_says_what_the_machine_code_takes(tmp_path):
    small = [(op, op.cases["small"](partial(made, torch.float16))) for op in OPS]
    asked = [cubins.words_of(op, arguments, options, 90) for op, (arguments, options) in small]
    cubins.write(tmp_path, asked)
    found = entries(tmp_path)
    assert sorted(entry["op"] for entry in found) == sorted(op.face.name for op in OPS)
    assert {path.name for path in tmp_path.iterdir()} == {cubins.MANIFEST, *(entry["file"] for entry in found)}
    for entry in found:
        code = disassembled("-elf", tmp_path / entry["file"])
        assert f".text.{entry['kernel']}\n" in code
        sizes = [int(size, 16) for size in re.findall(r"Size\s*:\s*(0x[0-9a-f]+)", code)]
        widths = {"p": 8, "i": 4}
        # the last parameter is described first
        assert sizes[::-1] == [widths[kind] for kind in entry["parameters"]] + [8] * int(entry["scratch"])


@compiles
def test_cubins_are_added_to_those_there_and_the_same_words_replace_their_line(tmp_path):
    cubins.write(tmp_path, [WORDS, WORDS])
    first = entries(tmp_path)
    cubins.write(tmp_path, [WORDS.replace("K=64", "K=128"), WORDS])
    assert len(first) == 1 and len(entries(tmp_path)) == 2
    assert first[0] in entries(tmp_path)


@compiles
def test_what_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    cubins.write(tmp_path, [WORDS])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(Path, "replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cubins.write(tmp_path, [WORDS.replace("K=64", "K=128")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("op=Nearest arch=90", "op=... first, one of ConcatProject"),
        (WORDS.replace(" K=64", ""), "in this order, op arch inputs G K D"),
        (WORDS.replace("K=64", "K=many"), "sizes are integers"),
        (WORDS.replace("arch=90", "arch=91"), "arch=91: kernels are made for 80, 86"),
        (WORDS.replace("float16,float16", "float16"), "inputs=float16: CodebookNearest has 2"),
        (WORDS.replace("float16,float16", "float16,int8"), "each one of float32, float16, bfloat16 or -"),
        (WORDS.replace("float16,float16", "float16,-"), "codebook of CodebookNearest cannot be left out"),
        (
            f"op=JointAttention arch=90 inputs={','.join(['float16'] * 6)} HEADS=2 D=48",
            "D=48: heads must be a power of two",
        ),
    ],
)
def test_words_that_name_no_kernel_are_refused_in_one_line(words, said, tmp_path, capsys):
    assert cubins.main(["-o", str(tmp_path / "new"), words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_folder_of_another_version_is_not_touched(tmp_path, capsys):
    (tmp_path / cubins.MANIFEST).write_text("tilewright cubins 0\n")
    assert cubins.main(["-o", str(tmp_path), WORDS]) == 2
    assert "does not begin with 'tilewright cubins 1'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [cubins.MANIFEST]


@compiles
def test_the_command_compiles_the_cases_it_is_asked_for(tmp_path):
    assert cubins.main(["-o", str(tmp_path), "--arch", "80", "--type", "bfloat16", "--case", "dino"]) == 0
    (entry,) = entries(tmp_path)
    assert (entry["op"], entry["arch"], entry["HEADS"], entry["D"]) == ("JointAttention", "80", "12", "64")
    assert set(entry["inputs"].split(",")) == {"bfloat16"}
