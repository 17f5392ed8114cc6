"""A bundle's own arguments on the command line, from the words a shell passes to the pixels of a file."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from tilewright.cli.main import main
from tilewright.runtime import load
from tilewright.runtime.bundle import read
from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.files import check_files
from tilewright.runtime.bundle.program import Input
from tilewright.runtime.bundle.safetensors import safetensors_header

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.fixture
def restored(tinted, tmp_path, capsys):
    """Restore a picture with these words after the usual ones; the pixels, or the line of the refusal."""
    Image.fromarray(IMAGE).save(tmp_path / "in.png")

    def restore(*words: str) -> np.ndarray:
        out = tmp_path / "out.png"
        code = main(["runtime", "restore", str(tmp_path / "in.png"), str(out), "--bundle", str(tinted), *words])
        said = capsys.readouterr()
        assert code == 0, said.err
        return np.asarray(Image.open(out))

    return restore


@pytest.fixture
def refused(tinted, tmp_path, capsys):
    """The one line and the exit code that these words end in."""
    Image.fromarray(IMAGE).save(tmp_path / "in.png")

    def restore(*words: str) -> tuple[str, int]:
        out = tmp_path / "out.png"
        code = main(["runtime", "restore", str(tmp_path / "in.png"), str(out), "--bundle", str(tinted), *words])
        said = capsys.readouterr()
        assert said.out == "" and said.err.count("\n") == 1 and not out.exists()
        return said.err.removeprefix("tilewright: ").rstrip("\n"), code

    return restore


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        ([], {}),
        (["--prompt", "dim warm red"], {"prompt": "dim warm red"}),
        (["--prompt=dim warm red"], {"prompt": "dim warm red"}),
        (["--prompt="], {"prompt": ""}),
        (["--prompt=--x"], {"prompt": "--x"}),
        (["--prompt=--x red", "--gain=0.5"], {"prompt": "--x red", "gain": 0.5}),
        (["--prompt=--tile"], {"prompt": "--tile"}),
        (["--gain", "2", "--prompt", "dim = red"], {"prompt": "dim = red", "gain": 2}),
        (["--gain", "-2", "--prompt", "red"], {"prompt": "red", "gain": -2}),
        (["--tile", "16", "--overlap", "0", "--prompt", "red", "--seed", "1"], {"prompt": "red"}),
    ],
)
def test_words_on_the_command_line_are_the_inputs_of_the_library(restored, tinted, words, inputs):
    tiles = {"tile": 16, "overlap": 0} if "--tile" in words else {}
    with load(tinted) as restorer:
        expected = restorer(IMAGE, **inputs, **tiles)
    np.testing.assert_array_equal(restored(*words), expected)


def test_a_file_is_given_by_its_path(restored, tinted, tmp_path):
    path = tmp_path / "a look=1.safetensors"
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, path)
    with load(tinted) as restorer:
        expected = restorer(IMAGE, look=path)
    for words in (["--look", str(path)], [f"--look={path}"]):
        np.testing.assert_array_equal(restored(*words), expected)


def test_a_scale_is_told_by_the_sizes(tinted, tmp_path, capsys):
    Image.fromarray(IMAGE).save(tmp_path / "in.png")
    words = ["runtime", "restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle", str(tinted)]
    assert main([*words, "--scale", "3", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["input_width"], told["input_height"], told["width"], told["height"]) == (30, 20, 90, 60)
    assert Image.open(tmp_path / "out.png").size == (90, 60)


TAKES = "this bundle takes --prompt, --look, --gain"
SEE = "see tilewright runtime restore --help"


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["--prompt"], f"argument --prompt: expected one argument; {SEE}", 2),
        (["--prompt", "--gain", "3"], f"argument --prompt: expected one argument; {SEE}", 2),
        (["--prompt", "dim", "red"], f"unknown argument 'red'; {TAKES}", 2),
        (["--pro", "dim"], f"unknown argument '--pro'; did you mean --prompt?; {TAKES}", 2),  # no abbreviations
        (["--ids", "3"], f"unknown argument '--ids'; did you mean --bits?; {TAKES}", 2),
        (["--gain", "high"], "--gain 'high' is not a number from -8 to 8", 2),
        (["--gain="], "--gain '' is not a number from -8 to 8", 2),
        (["--gain", "8.5"], "--gain '8.5' is not a number from -8 to 8", 2),
        (["--gain=-1e3"], "--gain '-1e3' is not a number from -8 to 8", 2),
        (["--gain", "nan"], "--gain 'nan' is not finite as float32; give a number from -8 to 8", 2),
        (["--gain", "1e40"], "--gain '1e40' is not finite as float32; give a number from -8 to 8", 2),
        (["--steps", "3"], "--steps 3: sharpen has no steps; leave it out", 2),
        (["--scale", "17"], "--scale 17 does not work with this bundle; use 1 to 16", 2),
        (["--seed", "1.5"], f"argument --seed: invalid int value: '1.5'; {SEE}", 2),
        (["--seed", "-1"], "--seed -1 is not a whole number from 0 to 4294967295", 2),
        (["--prompt", "red " * 6], "the text 'red red red red red red ' has 7 tokens, the network takes 6;", 2),
        (["--look", "nowhere"], "nowhere: No such file or directory; give a safetensors file with look.tint", 8),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line(refused, words, message, code):
    said, found = refused(*words)
    assert said.startswith(message)
    assert found == code


def helped(capsys, *words: str) -> str:
    """The text of a verb's help, on one line."""
    with pytest.raises(SystemExit) as ended:
        main(["runtime", *words, "--help"])
    assert ended.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("verb", ["restore", "profile"])
def test_the_arguments_of_a_bundle_are_listed_like_ours(tinted, capsys, monkeypatch, verb):
    monkeypatch.setenv("COLUMNS", "100")
    for named in (["--bundle", str(tinted)], [f"--bundle={tinted}"]):
        text = helped(capsys, verb, *named)
        ours, _, own = text.partition("arguments of this bundle (sharpen):")
        assert "--tile PX side of a tile" in ours and "--gain NUMBER 100%" not in ours
        assert '--prompt WORDS the tint in words (default: "bright bright bright")' in own
        assert "--look FILE what a prompt becomes (default: none)" in own
        assert "--gain NUMBER 100% is 1; a number from -8 to 8 (default: 1)" in own
    plain = helped(capsys, verb)
    assert "--gain" not in plain and "--bundle DIR --help lists them" in plain


def test_the_help_of_a_bundle_without_arguments_says_so(bundle, capsys):
    assert helped(capsys, "restore", "--bundle", str(bundle)).endswith("arguments of this bundle (sharpen): none")


def test_inspect_lists_the_arguments(tinted, capsys):
    assert main(["export", "inspect", str(tinted)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("argument ")]
    assert lines == [
        'argument --prompt: words (default: "bright bright bright"); the tint in words',
        "argument --look: a safetensors file (default: none); what a prompt becomes",
        "argument --gain: a number from -8 to 8 (default: 1); 100% is 1",
    ]
    assert main(["export", "inspect", str(tinted), "--json"]) == 0
    listed = json.loads((tinted / "bundle.json").read_text())["arguments"]
    assert json.loads(capsys.readouterr().out)["arguments"] == listed


def test_a_choice_is_offered_and_others_are_refused(tint, tinting, tmp_path, capsys):
    mode = Input("int64", default=0, choices={"off": 0, "on": 1})
    bundle = tint(program=replace(tinting, inputs=tinting.inputs | {"mode": mode}))
    assert "--mode {off,on} (default: off)" in helped(capsys, "restore", "--bundle", str(bundle))
    Image.fromarray(IMAGE).save(tmp_path / "in.png")
    words = ["runtime", "restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle", str(bundle)]
    assert main([*words, "--mode", "on"]) == 0
    capsys.readouterr()
    for wrong in ("1", "auto", ""):
        assert main([*words, "--mode", wrong]) == 2
        assert capsys.readouterr().err == f"tilewright: --mode {wrong!r} is not one of off, on\n"


def test_words_without_a_default_are_asked_for_before_anything_is_read(tint, tinting, tmp_path, capsys):
    needed = replace(tinting.texts["prompt"], default=None)
    bundle = tint(program=replace(tinting, texts={"prompt": needed}))
    assert "--prompt WORDS the tint in words (needed)" in helped(capsys, "restore", "--bundle", str(bundle))
    words = ["runtime", "restore", str(tmp_path / "no.png"), str(tmp_path / "out.png"), "--bundle", str(bundle)]
    assert main(words) == 2
    assert capsys.readouterr().err == "tilewright: --prompt has no default; give it: the tint in words\n"
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, tmp_path / "look.safetensors")
    Image.fromarray(IMAGE).save(tmp_path / "no.png")
    assert main([*words, "--look", str(tmp_path / "look.safetensors")]) == 0


def test_a_restoration_reads_its_bundle_once(restored, monkeypatch):
    reads = []
    monkeypatch.setattr(read, "check_files", lambda *given: reads.append(given[0].name) or check_files(*given))
    restored("--prompt", "red")
    assert reads == ["tint.bundle"]


def test_a_prompt_that_is_no_unicode_is_refused(refused):
    said, code = refused("--prompt", b"caf\xe9".decode(errors="surrogateescape"))
    assert (said, code) == (r"the text 'caf\udce9' is not valid Unicode; write it in UTF-8", 2)


def test_a_file_of_another_shape_is_refused_by_its_path(refused, tmp_path: Path):
    save_file({"look.tint": np.ones((1, 4), np.float32)}, tmp_path / "look.safetensors")
    said, code = refused("--look", str(tmp_path / "look.safetensors"))
    assert said.endswith("'look.tint' has shape [1, 4], this bundle takes [1, 3]; use its own")
    assert code == 8


@pytest.mark.parametrize(
    "words",
    [
        ("runtime", "restore", "in.png", "out.png", "--bundle"),
        ("runtime", "plan", "64", "64", "--bundle"),
        ("runtime", "profile", "--bundle"),
        ("export", "inspect"),
        ("export", "verify"),
    ],
    ids=" ".join,
)
def test_every_verb_that_opens_a_bundle_takes_its_digest(bundle, tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    digest = sha256_of_bytes((bundle / "bundle.json").read_bytes())
    assert main([*words, str(bundle), "--expect", "0" * 12]) == 3
    assert f"SHA-256 {digest} is not the expected 000000000000" in capsys.readouterr().err
    if words[1] in ("plan", "inspect"):
        assert main([*words, str(bundle), "--expect", digest[:12]]) == 0


def test_weights_that_are_no_numbers_end_a_restoration_with_exit_7_and_no_picture(
    two_folder_bundle, two_folders, tmp_path, capsys
):
    file = tmp_path / "other" / "extra" / "weights.safetensors"
    _, offset, _ = safetensors_header(file)["single"]
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = struct.pack("<f", math.nan)
    file.write_bytes(data)
    Image.new("RGB", (16, 16)).save(tmp_path / "in.png")
    words = ["runtime", "restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--bundle"]
    assert main([*words, str(two_folder_bundle())]) == 7
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "tilewright: pass 'add', once: add.sum holds nan, 256 of 768 numbers are not finite; check the weights, and the"
        " bundle with 'tilewright export verify'"
    ]
    assert not (tmp_path / "out.png").exists()
