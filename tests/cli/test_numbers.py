"""Our own numeric options on the command line: a word that is no such number is refused in one line with its name."""

from pathlib import Path

import pytest
from PIL import Image

from tilewright.cli.main import main

WORDS = ["1.5", "-1", "nan", "inf", "1e3", "two", "", "True", "0x10", "9" * 30]
RESTORE = ("runtime", "restore", "in.png", "out.png", "--bundle", "b")
SIMULATE = ("runtime", "simulate", "--bundle", "b", "64x64", "--step-ms", "1")
PROFILE = ("runtime", "profile", "--bundle", "b", "--resolutions", "16")
OPTIONS = {
    RESTORE: ["--seed", "--steps", "--scale", "--overlap", "--threads", "--batch", "--checkpoint"],
    PROFILE: ["--steps", "--threads", "--batch"],
    SIMULATE: ["--devices", "--images", "--steps"],
}
FINE = {("--checkpoint", "1.5"), ("--checkpoint", "1e3")}


@pytest.fixture(autouse=True)
def folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b").symlink_to(bundle)
    Image.new("RGB", (16, 16)).save("in.png")


def refused(capsys: pytest.CaptureFixture[str], option: str, *words: str) -> None:
    assert main([*words, "-q"]) == 2, words
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tilewright: ") and option in line and "Error" not in line, line
    assert not Path("out.png").exists()


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("command", OPTIONS, ids=lambda words: words[1])
def test_a_word_that_is_no_such_number(capsys, command, word) -> None:
    for option in OPTIONS[command]:
        if (option, word) not in FINE:
            refused(capsys, option, *command, f"{option}={word}")


@pytest.mark.parametrize("word", ["1.5", "-1", "0", "nan", "x", ""])
def test_limits_tiles_and_runs(capsys, word) -> None:
    refused(capsys, "--tile", *RESTORE, f"--tile={word}")
    refused(capsys, "--max-pixels", *RESTORE, f"--max-pixels={word}")
    refused(capsys, "--runs", *PROFILE, f"--runs={word}")
    refused(capsys, "--tile", "runtime", "plan", "16", "16", "--bundle", "b", f"--tile={word}")


@pytest.mark.parametrize("word", ["-1", "0", "nan", "inf", "x", ""])
def test_times_of_a_simulation(capsys, word) -> None:
    refused(capsys, "--step-ms", *SIMULATE[:-2], f"--step-ms={word}")
    if word != "0":
        refused(capsys, "--join-ms", *SIMULATE, f"--join-ms={word}")


@pytest.mark.parametrize("word", ["-1", "0", "nan", "GiB", "1e3", "", "9" * 30 + "GiB"])
def test_amounts_of_memory(capsys, word) -> None:
    refused(capsys, "--memory-limit", *RESTORE, f"--memory-limit={word}")


@pytest.mark.parametrize("sides", [("0", "16"), ("-1", "16"), ("1.5", "16"), ("x", "16"), ("16", "nan")])
def test_the_sides_of_a_plan(capsys, sides) -> None:
    refused(capsys, "", "runtime", "plan", "--bundle", "b", "--", *sides)
