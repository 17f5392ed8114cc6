"""The card of a bundle: its front matter is read as a hub reads it, its commands and its snippet are run."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from tilewright.cli.main import main
from tilewright.runtime.bundle.read import read_bundle

__all__ = ["check_card"]


def check_card(bundle: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModelCard:
    """Every command and snippet of the card runs in a folder with the bundle and a picture; the front matter.

    Where the bundle takes steps, they run with two.
    """
    text = (bundle / "README.md").read_text()
    (folder / bundle.name).symlink_to(bundle)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)).save(folder / "in.png")
    monkeypatch.chdir(folder)
    pictures, stepped = [], any(p.steps for p in read_bundle(bundle).program.passes)
    commands = [line for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    for command in commands:
        program, *words = shlex.split(command)
        assert program == "tilewright" and main([*words, *["--steps", "2"] * stepped]) == 0, command
        pictures.append(take(folder / "out.png"))
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    for snippet in snippets:
        if stepped:
            snippet = snippet.replace('restorer("in.png"', 'restorer("in.png", steps=2')
        exec(compile(snippet, "README.md", "exec"), {})
        pictures.append(take(folder / "out.png"))
    assert len(commands) == len(snippets) == 1
    np.testing.assert_array_equal(*pictures)
    check_table(bundle, text)
    inline = re.search(r"`tilewright (runtime restore [^`]* --help)`", text)
    assert inline
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(inline[1]))
    assert ended.value.code == 0
    return ModelCard(text)


def take(path: Path) -> np.ndarray:
    """The pixels of a picture, which is removed so that nothing else passes for it."""
    pixels = np.asarray(Image.open(path))
    path.unlink()
    return pixels


def check_table(bundle: Path, text: str) -> None:
    """A row for every argument of the program, and no other."""
    program = read_bundle(bundle).program
    named = [*program.texts, *program.files, *(name for name, taken in program.inputs.items() if not taken.shape)]
    rows = re.findall(r"^\| `--([a-z-]+)` \| `(\w+)` \| ([^|]+) \| ([^|]*) \| ([^|]+) \|$", text, re.MULTILINE)
    assert sorted(keyword for _, keyword, *_ in rows) == sorted(named)
    assert all(option.replace("-", "_") == keyword and what.strip() for option, keyword, _, _, what in rows)
