"""`profile` with several settings, its files, and `profile diff`."""

import json
from pathlib import Path

import pytest

from tilewright.cli.main import main


@pytest.fixture
def folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b").symlink_to(bundle)
    return tmp_path


def profiled(*words: str) -> int:
    return main(["runtime", "profile", *words])


def test_each_engine_set_of_devices_and_batch_is_measured(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--bundle", "b", "--resolutions", "16,32x16,32", "--batch", "1,2", "--devices", "cpu:0", "--tile", "16")
    more = ("--overlap", "0", "--threads", "1", "--interpolate", "24,90", "--json", "p.json", "--html", "p.html", "-q")
    assert profiled(*words, *more) == 0
    said = capsys.readouterr().out
    document = json.loads(Path("p.json").read_text())
    assert [setting["batch"] for setting in document["settings"]] == [1, 2]
    assert said.count("by interpolation") == 4 and "outside of what was measured" in said
    for setting in document["settings"]:
        assert [row["tiles"]["restore"] for row in setting["resolutions"]] == [1, 2, 4]
        for row in setting["resolutions"]:
            assert row["waste"] == {"restore": 0.0} and len(row["runs_s"]) == 5
            assert row["first_part_s"] > 0 and 0 < row["outside_engines"] < 1
            assert row["images_per_second"] == pytest.approx(5 / sum(row["runs_s"]))
    assert Path("p.html").read_text().startswith("<!doctype html>")
    assert profiled("diff", "p.json", "p.json") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and all("no difference beyond noise" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ((), 2, "profile needs --bundle DIR, or: profile diff OLD.json NEW.json"),
        (("diff", "a.json"), 2, "profile 'diff a.json': write profile diff OLD.json NEW.json"),
        (("diff", "a.json", "a.json"), 8, "a.json cannot be read (No such file or directory): check the path"),
        (("diff", "b/bundle.json", "b/bundle.json"), 8, "b/bundle.json is no profile: name a file that profile"),
        (("--bundle", "b", "--batch", "1,x"), 2, "--batch '1,x' is no list of numbers; write 1 or 1,2,4"),
        (("--bundle", "b", "--resolutions", "8", "--html", "b"), 2, "b is a directory: name a file"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], code: int, said: str
) -> None:
    assert profiled(*words, "-q") == code
    assert said in capsys.readouterr().err
