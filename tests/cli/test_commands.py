"""The command as a user types it: answers, JSON, exit codes, one-line errors."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.commands import told
from support.pages import help_of
from tilewright.cli.commands import GROUPS, parser, within
from tilewright.cli.main import main

ROOT = Path(__file__).parents[2]


def started(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "tilewright.cli.main", *map(str, words)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300, check=False
    )


def refused(result: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line of an error."""
    assert result.returncode == code, result.stderr
    assert result.stdout == ""
    lines = [line for line in result.stderr.splitlines() if line.startswith("tilewright: ")]
    assert len(lines) == 1 and "Traceback" not in result.stderr
    return lines[0]


def verbs() -> list[tuple[str, str]]:
    of_group = {group: within(parser([group]), [group])._actions for group in GROUPS}
    return [
        (g, v) for g, actions in of_group.items() for a in actions if isinstance(a.choices, dict) for v in a.choices
    ]


@pytest.mark.parametrize(("group", "verb"), verbs())
def test_every_verb_has_help_and_is_in_a_document(group: str, verb: str) -> None:
    assert {"--json", "--quiet", "--verbose"} <= set(re.findall(r"--\w+", help_of(group, verb)))
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    assert any(f"tilewright {group} {verb}" in page.read_text() for page in pages)


def test_the_exit_codes_are_documented_where_users_look() -> None:
    for text in (help_of(), (ROOT / "docs" / "command-line.md").read_text()):
        assert {"0", "1", "2", "3", "4", "5", "6", "7", "8", "130", "143"} <= set(re.findall(r"\d+", text))


def test_list_names_systems_and_presets() -> None:
    assert "hitoksr" in told("export", "list").stdout
    rows = json.loads(told("export", "list", "--json").stdout)
    assert {"full", "tiny"} <= set(next(r for r in rows if r["system"] == "hitoksr")["presets"])


@pytest.mark.slow
def test_a_second_build_does_nothing_quickly_and_says_so(hitoksr_tiny: Path) -> None:
    words = ("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", hitoksr_tiny)
    before = {f: f.stat().st_mtime_ns for f in hitoksr_tiny.rglob("*")}
    result = told(*words)
    assert result.returncode == 0 and "up to date" in result.stdout
    assert {f: f.stat().st_mtime_ns for f in hitoksr_tiny.rglob("*")} == before
    assert json.loads(told(*words, "--json").stdout)["built"] is False
    predicted = json.loads(told(*words, "--dry-run", "--json").stdout)
    assert predicted["stages"] == [] and predicted["disk_bytes"] == 0


@pytest.mark.slow
def test_a_dry_run_predicts_and_leaves_nothing(tmp_path: Path) -> None:
    words = ("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "1", "--batch", "1,2")
    predicted = json.loads(told(*words, "--dry-run", "--json", TILEWRIGHT_CACHE_DIR=str(tmp_path / "c")).stdout)
    assert predicted["stages"] == ["attach", "constants", "trace", "optimise", "verify", "seal"]
    assert predicted["disk_bytes"] > 0 and predicted["peak_memory_bytes"] > 0
    refusal = told(*words, TILEWRIGHT_CACHE_DIR=str(tmp_path / "c"))
    assert (refusal.returncode, refusal.stderr.count("\n")) == (2, 1) and "-o/--out is not given" in refusal.stderr
    assert {path.parent.name for path in (tmp_path / "c").glob("build/*/*")} == {"parameters"}  # names and shapes


@pytest.mark.slow
def test_explain_names_the_input_that_changed(hitoksr_tiny: Path) -> None:
    words = ("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "5", "-o", hitoksr_tiny)
    said = told(*words, "--dry-run", "--explain").stderr
    assert "attach runs, changed: weights" in said and "trace runs" not in said
    same = (*words[:6], "0", *words[7:])
    assert "nothing changed" in told(*same, "--dry-run", "--explain").stderr
    changed = json.loads(told(*words, "--dry-run", "--explain", "--json").stdout)["changed"]
    assert changed["attach"] == ["weights"] and "trace" not in changed
    assert "no earlier build" in told(*words[:-1], "never-built", "--dry-run", "--explain").stderr


def test_inspect_accounts_for_every_byte(hitoksr_tiny: Path) -> None:
    found = json.loads(told("export", "inspect", hitoksr_tiny, "--json").stdout)
    assert found["bytes"]["orphaned"] == 0
    assert found["bytes"]["referenced"] > 100 * found["bytes"]["materialised"]
    assert "orphaned 0" in told("export", "inspect", hitoksr_tiny).stdout


@pytest.mark.slow
def test_verify_writes_its_report(hitoksr_tiny: Path, tmp_path: Path) -> None:
    bundle = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    (bundle / "reports" / "accuracy.json").unlink()
    report = json.loads(told("export", "verify", bundle, "--json").stdout)
    assert json.loads((bundle / "reports" / "accuracy.json").read_text()) == report
    judged = report["engines"]["ort-float32"]["components"]
    assert judged["generate"]["choices"]["wrong"] == 0
    assert judged["decode"]["outputs"]["image"]["relative_l2"] <= 1e-5


def test_restore_writes_a_picture_and_tells_its_cost(hitoksr_tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.png"
    result = started("runtime", "restore", ROOT / "docs" / "sample.png", out, "--bundle", hitoksr_tiny, "--json")
    answer = json.loads(result.stdout)
    assert Image.open(out).size == (512, 512) == (answer["width"], answer["height"])
    assert answer["tiles"] == {"restore": 1} and answer["peak_bytes"] > 0 and answer["seam_excess"] == 0
    assert {"generate", "decode", "total", "open", "read", "write"} <= answer["seconds"].keys()
    assert "random weights" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["low", pytest.param("fast", marks=pytest.mark.slow)])
def test_tiles_threads_workers_and_memory_change_nothing_that_shows(
    hitoksr_tiny: Path, tmp_path: Path, memory: str
) -> None:
    sample, first, second = ROOT / "docs" / "sample.png", tmp_path / "1.png", tmp_path / "2.png"
    common = ("--bundle", hitoksr_tiny, "--tile", "256", "--overlap", "32")
    assert told("runtime", "restore", sample, first, *common, "--threads", 1).returncode == 0
    options = ("--threads", 1, "--devices", "cpu:0,cpu:1", "--memory", memory)
    assert told("runtime", "restore", sample, second, *common, *options).returncode == 0
    one, two = (np.asarray(Image.open(path)).astype(int) for path in (first, second))
    assert np.abs(one - two).max() <= 1


def test_plan_runs_nothing_and_counts_tiles(hitoksr_tiny: Path) -> None:
    answer = json.loads(told("runtime", "plan", 640, 360, "--bundle", hitoksr_tiny, "--json").stdout)
    # 2560x1440 in tiles of 512 with overlap 64: ceil(2496/448) x ceil(1376/448)
    assert answer["result"] == [2560, 1440] and answer["passes"][0]["tiles"] == 6 * 4
    assert answer["needed_bytes"] > 4 * 6 * 2560 * 1440
    assert "6x4 tiles" in told("runtime", "plan", 640, 360, "--bundle", hitoksr_tiny).stdout


@pytest.mark.slow
def test_profile_measures_each_resolution(hitoksr_tiny: Path) -> None:
    words = ("runtime", "profile", "--bundle", hitoksr_tiny, "--resolutions", "64,96x48")
    answer = json.loads(told(*words, "--json").stdout)
    (setting,) = answer["settings"]
    assert [(r["width"], r["height"]) for r in setting["resolutions"]] == [(64, 64), (96, 48)]
    for row in setting["resolutions"]:
        assert 0 < row["seconds"]["p50"] <= row["seconds"]["max"] and len(row["seconds"]) == 2
        assert row["peak_bytes"] > 0 and row["megapixels_per_second"] > 0 and row["tiles"] == {"restore": 1}
    assert len(answer["bundle"]) == 64 and answer["hardware"]["cores"] >= 1
    assert setting["devices"] == ["cpu:0"] and setting["engine"].startswith("onnxruntime ")
    heads, *rows = told(*words).stdout.splitlines()[2:]
    assert "p50 s" in heads and "max s" in heads and "p9" not in heads and len(rows) == 2


def test_clean_empties_the_cache_but_not_bundles(tmp_path: Path) -> None:
    stage = tmp_path / "build" / "trace" / "abc"
    stage.mkdir(parents=True)
    (stage / "x").write_bytes(b"12345")
    cleaned = json.loads(told("export", "clean", "--json", TILEWRIGHT_CACHE_DIR=str(tmp_path)).stdout)
    assert cleaned == {"freed_bytes": 5, "converted_bytes": 0, "bundles": []} and not stage.exists()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("export", "build", "nosuch", "--random-weights", "0", "-o", "x"), 2, "'nosuch' is not one of"),
        (("export", "build", "hitoksr", "--preset", "huge", "--random-weights", "0", "-o", "x"), 2, "'huge'"),
        (("export", "build", "hitoksr", "--preset", "tiny", "--weights", "nowhere", "-o", "x"), 8, "nowhere"),
        (("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "-1", "-o", "x"), 2, "-1"),
        (("export", "inspect", "nowhere"), 3, "nowhere"),
        pytest.param(("export", "verify", "nowhere"), 3, "nowhere", marks=pytest.mark.slow),  # loads PyTorch
        (("runtime", "plan", "10", "10", "--bundle", "nowhere"), 3, "nowhere"),
        (("runtime", "restore", "in.png", "out.png", "--bundle", "nowhere"), 3, "nowhere"),
    ],
)
def test_bad_input_gets_one_line_and_its_exit_code(
    words: tuple[str, ...], code: int, said: str, tmp_path: Path
) -> None:
    assert said in refused(told(*words, cwd=tmp_path), code)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_picture_is_exit_8_and_leaves_no_output(hitoksr_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(b"not a picture")
    said = refused(told("runtime", "restore", "in.png", "out.png", "--bundle", hitoksr_tiny, cwd=tmp_path), 8)
    assert "in.png" in said and not (tmp_path / "out.png").exists()


def test_an_unknown_option_of_a_bundle_is_exit_2(hitoksr_tiny: Path) -> None:
    sample = ROOT / "docs" / "sample.png"
    words = ("runtime", "restore", sample, "out.png", "--bundle", hitoksr_tiny)
    assert "--guidance" in refused(told(*words, "--guidance", 3), 2)
    assert "overlap" in refused(told(*words, "--tile", 64, "--overlap", 48), 2)


def test_verbose_adds_the_trace_and_keeps_the_exit_code(tmp_path: Path) -> None:
    result = told("export", "inspect", "nowhere", "--verbose", cwd=tmp_path)
    assert result.returncode == 3 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("tilewright: nowhere: no bundle.json")


@pytest.mark.parametrize(
    "words", [(), ("export",), ("export", "build"), ("runtime", "plan", "a", "b", "--bundle", "x")]
)
def test_a_command_cut_short_is_one_line_and_exit_2(words: tuple[str, ...]) -> None:
    assert "--help" in refused(told(*words), 2)


def test_a_full_disk_and_a_bug_have_their_own_line_and_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for error, code, said in [
        (OSError(errno.ENOSPC, "No space left on device", "x.onnx"), 5, "x.onnx: No space left on device"),
        (OSError(errno.EACCES, "Permission denied", "out"), 4, "out: Permission denied"),
        (MemoryError(), 5, "out of memory"),
        (ZeroDivisionError("division by zero\nor so"), 1, "internal error, ZeroDivisionError"),
    ]:

        def fail(older_than: float, *, converted: bool, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr("tilewright.export.build.clean.clean", fail)
        assert main(["export", "clean"]) == code
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and said in lines[0]


def test_a_missing_engine_is_exit_4(hitoksr_tiny: Path, tmp_path: Path) -> None:
    # a package that refuses to be imported stands where ONNX Runtime would be
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if n == 'onnxruntime' else f(n, *a)\n"
    )
    words = ("runtime", "restore", ROOT / "docs" / "sample.png", tmp_path / "o.png", "--bundle", hitoksr_tiny)
    assert "pip install" in refused(started(*words, PYTHONPATH=str(tmp_path)), 4)


@pytest.mark.slow
def test_too_little_memory_is_exit_5_before_anything_runs(hitoksr_tiny: Path, tmp_path: Path) -> None:
    big = tmp_path / "big.png"
    Image.new("RGB", (20_000, 5_000)).save(big)
    words = ("runtime", "restore", big, tmp_path / "out.png", "--bundle", hitoksr_tiny, "--max-pixels", 10**9)
    (tmp_path / "sitecustomize.py").write_text(
        "import tilewright.runtime.restore as r; r.available_bytes = lambda: 10**9\n"
    )
    said = refused(started(*words, "--tile", 80_000, PYTHONPATH=str(tmp_path)), 5)
    assert "GiB" in said and not (tmp_path / "out.png").exists()
