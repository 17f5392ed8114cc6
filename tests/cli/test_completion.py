"""The scripts of `tilewright completion`, asked by the shells that they are for."""

import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tilewright.cli.commands import parser, within
from tilewright.cli.completion import script
from tilewright.cli.main import main
from tilewright.export.systems import names

BUILD = within(parser(["export", "build"]), ["export", "build"])
ASKED = [  # a line up to the cursor, and the words that the shell offers
    ("tilewright ", {"export", "runtime", "calib", "kernels", "completion", "--help", "--version"}),
    ("tilewright ex", {"export"}),
    ("tilewright export st", {"stand-in"}),
    ("tilewright export build ", set(names())),
    ("tilewright export build hitoksr --verify ", {"auto", "always", "never"}),
    ("tilewright export build hitoksr --preset ti", {"tiny"}),
    ("tilewright export build hitoksr --random-weights 0 --pac", {"--pack"}),
    ("tilewright export build --lora-mode ", {"branch", "merge"}),
    ("tilewright export inspect ", {"folder"}),
    ("tilewright runtime restore ", {"picture.png", "folder"}),
    ("tilewright runtime restore picture.png out.png --bundle ", {"folder"}),
    ("tilewright runtime restore --memory ", {"fast", "low"}),
    ("tilewright runtime select --scores picture.png pic", {"picture.png"}),
    ("tilewright calib collect folder ", {"folder"}),
    ("tilewright completion ", {"bash", "zsh", "fish"}),
    ("tilewright nosuch ", set()),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one picture and one folder."""
    (tmp_path / "picture.png").touch()
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shell(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def test_bash_offers_what_may_follow(here: Path) -> None:
    ask = 'ask() { COMP_WORDS=("$@"); COMP_CWORD=$(($#-1)); COMPREPLY=(); _tilewright; echo "${COMPREPLY[*]}"; }'
    lines = [" ".join(f"'{word}'" for word in line.split(" ")) for line, _ in ASKED]
    text = "\n".join([script("bash"), ask, *(f"ask {line}" for line in lines)])
    done = subprocess.run([shell("bash"), "--norc", "-c", text], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    offered = [set(line.split()) for line in done.stdout.splitlines()]
    assert dict(zip((line for line, _ in ASKED), offered, strict=True)) == dict(ASKED)


def test_fish_offers_what_may_follow_and_says_what_options_do(here: Path) -> None:
    (here / "tilewright.fish").write_text(script("fish"))
    for line, words in [*ASKED, ("tilewright export list --q", {"--quiet"})]:
        if "nosuch" in line:
            continue  # fish then offers files, as it does where a command says nothing
        text = f'source tilewright.fish; complete -C "{line}"'
        done = subprocess.run([shell("fish"), "--no-config", "-c", text], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        offered = dict(row.partition("\t")[::2] for row in done.stdout.splitlines())
        words = words | {"tilewright.fish"} if "picture.png" in words and line.endswith("restore ") else words
        assert {word.rstrip("/") for word in offered} == words, line
    assert offered["--quiet"] == "no progress and no notes"


def test_zsh_completes_a_line(here: Path) -> None:
    (here / "tilewright.zsh").write_text(script("zsh"))
    program, number = shell("zsh"), 0
    child, terminal = pty.fork()
    if child == 0:
        os.execve(program, [program, "-f", "-i"], {**os.environ, "TERM": "dumb", "PS1": "$ "})

    def say(text: str, until: str) -> str:
        os.write(terminal, text.encode())
        said, end = "", time.monotonic() + 60
        while until not in said and time.monotonic() < end:
            if select.select([terminal], [], [], 1)[0]:
                said += os.read(terminal, 65536).decode(errors="replace")
        return said

    try:
        say("autoload -Uz compinit; compinit -u -D; source ./tilewright.zsh; echo rea''dy\n", "ready")
        for typed, completed in [
            ("tilewright export bu", "tilewright export build "),
            ("tilewright export build hitoksr --veri", "--verify "),
            ("tilewright runtime restore pic", "picture.png "),
            ("tilewright export inspect fol", "folder/"),
        ]:
            assert completed in say(f"{typed}\t", completed)
            number += 1
            say(f"\x15echo do''ne{number}\n", f"done{number}")
    finally:
        os.close(terminal)
        os.waitpid(child, 0)


@pytest.mark.slow
def test_every_option_of_a_verb_is_in_each_script() -> None:
    options = {option for action in BUILD._actions for option in action.option_strings}
    assert {"--weights", "--verify"} <= options
    for name in ("bash", "zsh", "fish"):
        text = script(name)
        assert all(option in text for option in options)


def test_an_unknown_shell_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "tcsh"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert "'tcsh'" in said.err and all(name in said.err for name in ("bash", "zsh", "fish"))
