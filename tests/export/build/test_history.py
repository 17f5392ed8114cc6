"""The time of past builds, and dry runs that predict from it and refuse what does not fit."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tilewright.cli.main import main
from tilewright.export.build.history import note_of, remember, usual_seconds
from tilewright.export.build.request import Request

WORDS = ("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "1", "-o")


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))


def tiny(out: Path, name: str = "hitoksr") -> Request:
    return Request(name, "tiny", out, seed=0)


def age(request: Request, seconds: float) -> None:
    """Let the note of a build be so old."""
    note = note_of(request.out)
    when = note.stat().st_mtime - seconds
    os.utime(note, (when, when))


def test_the_latest_build_of_a_system_counts_and_other_systems_do_not(own_cache: None, tmp_path: Path) -> None:
    first, second, other = tiny(tmp_path / "a"), tiny(tmp_path / "b"), tiny(tmp_path / "c", "toksr")
    assert usual_seconds(first) == {}
    remember(first, "", {}, {"trace": 5, "seal": 1})
    remember(other, "", {}, {"verify": 9})
    assert usual_seconds(second) == {"trace": 5, "seal": 1}
    remember(second, "", {}, {"seal": 2})
    age(first, 100)
    assert usual_seconds(first) == usual_seconds(second) == {"trace": 5, "seal": 2}
    age(second, 200)
    assert usual_seconds(first) == {"trace": 5, "seal": 1}
    assert usual_seconds(other) == {"verify": 9}


def test_the_build_of_the_nearest_size_counts_and_a_much_larger_one_does_not(own_cache: None, tmp_path: Path) -> None:
    for name, factor, seconds in (("near", 1.1, 3), ("far", 1.9, 4), ("smaller", 0.6, 5), ("beyond", 2.1, 6)):
        request = tiny(tmp_path / name)
        remember(request, "", {}, {"verify": seconds})
        note = json.loads(note_of(request.out).read_text())
        note_of(request.out).write_text(json.dumps(note | {"parameters": factor * note["parameters"]}))
    for expected, name in ((3, "near"), (5, "smaller"), (4, "far")):
        assert usual_seconds(tiny(tmp_path / "x")) == {"verify": expected}
        note_of(tmp_path / name).unlink()
    assert usual_seconds(tiny(tmp_path / "x")) == {}


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"system": "hitoksr", "parameters": "many", "seconds": {}}'])
def test_a_note_that_cannot_be_read_counts_as_none(own_cache: None, tmp_path: Path, text: str) -> None:
    remember(tiny(tmp_path / "a"), "", {}, {"trace": 5})
    note_of(tmp_path / "b").write_text(text)
    assert usual_seconds(tiny(tmp_path / "b")) == {"trace": 5}


def test_a_dry_run_predicts_the_time_of_each_stage_from_a_build(hitoksr_tiny: Path, tmp_path: Path, capsys) -> None:
    seconds = json.loads(note_of(hitoksr_tiny).read_text())["seconds"]
    assert main([*WORDS, str(tmp_path / "b"), "--dry-run", "--json"]) == 0
    predicted = json.loads(capsys.readouterr().out)
    assert set(predicted["seconds"]) == set(predicted["stages"]) > {"attach", "seal"}
    assert all(predicted["seconds"][stage] > 0 for stage in seconds.keys() & predicted["seconds"].keys())
    assert predicted["free_memory_bytes"] > 0 and predicted["free_disk"].keys() == predicted["disk"].keys()
    assert main([*WORDS, str(tmp_path / "b"), "--dry-run"]) == 0
    assert "\ntime: about " in capsys.readouterr().out


def test_without_a_build_a_dry_run_says_that_the_time_is_unknown(own_cache: None, tmp_path: Path, capsys) -> None:
    assert main([*WORDS, str(tmp_path / "b"), "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("time: unknown, no build of this size has run here\n")


@pytest.mark.parametrize("lacking", ["memory", "disk"])
def test_a_dry_run_of_what_does_not_fit_ends_with_code_5_and_the_numbers(
    own_cache: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, lacking: str
) -> None:
    if lacking == "memory":
        monkeypatch.setattr("tilewright.export.build.preflight.available_bytes", lambda: 10_000_000)
    else:
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    words = [*WORDS, str(tmp_path / "b"), "--verify", "always", "--dry-run"]
    assert main([*words, "--json"]) == 5
    said = json.loads(capsys.readouterr().out)
    assert said["error"]["code"] == 5 and said["peak_memory_bytes"] > 10_000_000 and said["disk_bytes"] > 1000
    assert said["free_memory_bytes"] == 10_000_000 or set(said["free_disk"].values()) == {1000}
    assert main(words) == 5
    out, err = capsys.readouterr()
    assert out.startswith("stages: attach, ") and len(err.splitlines()) == 1
    assert not (tmp_path / "b").exists()
