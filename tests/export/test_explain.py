"""`export explain`: what it says runs again is what another request would run again."""

import json
import shutil
from pathlib import Path

import pytest

from tilewright.cli.main import main
from tilewright.export.build.cache import Stage
from tilewright.export.build.history import note_of
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.build.stage_list import list_stages
from tilewright.export.explain import explain
from tilewright.runtime.bundle.digests import sha256_of_file

pytest_plugins = ("support.bundles",)
VERSION = "tilewright.export.build.versions.version"


def stages(bundle: Path, **changes: object) -> dict[str, Stage]:
    """The stages of a request like the one of `hitoksr_tiny`."""
    asked = {"name": "hitoksr", "preset": "tiny", "out": bundle, "seed": 0} | changes
    return {stage.name: stage for stage in list_stages(Request(**asked))}  # type: ignore[arg-type]


def differing(before: dict[str, Stage], after: dict[str, Stage]) -> set[str]:
    return {name for name in before if before[name].key != after[name].key}


def test_each_stage_is_shown_with_its_inputs_and_the_place_of_its_result(hitoksr_tiny: Path) -> None:
    listed = stages(hitoksr_tiny)
    report = explain(hitoksr_tiny)
    assert report["remembered"] and {s["stage"] for s in report["stages"]} == listed.keys()
    seen: set[str] = set()
    for shown in report["stages"]:
        stage = listed[shown["stage"]]
        directory = hitoksr_tiny if stage.name == "seal" else stage.directory
        assert (shown["inputs"], shown["directory"], shown["cached"]) == (stage.inputs, str(directory), True)
        assert not shown["changed"] and not shown["would_run"]
        assert {name for name, s in listed.items() if s.key == stage.inputs.get(name)} == set(shown["after"]) <= seen
        seen.add(stage.name)


@pytest.mark.parametrize(
    ("name", "changes"),
    [("weights", {"seed": 1}), ("packed", {"pack": True}), ("ops", {"ops": "standard"})],
)
def test_a_request_with_another_option_runs_what_was_said(hitoksr_tiny: Path, name: str, changes: dict) -> None:
    other = stages(hitoksr_tiny, **changes)
    assert set(explain(hitoksr_tiny)["runs_again"][name]) == differing(stages(hitoksr_tiny), other)


@pytest.mark.parametrize("package", ["torch", "onnx", "onnxruntime", "tokenizers", "diffusers"])
def test_another_version_of_a_package_runs_what_was_said(
    hitoksr_tiny: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from tilewright.export.build.versions import version

    before, said = stages(hitoksr_tiny), explain(hitoksr_tiny)["runs_again"][f"version {package}"]

    def another(name: str) -> str:
        return "another" if name == package else version(name)

    monkeypatch.setattr(VERSION, another)
    monkeypatch.setattr("tilewright.export.explain.version", another)
    after = differing(before, stages(hitoksr_tiny))
    assert set(said) == after
    report = explain(hitoksr_tiny)
    assert {s["stage"] for s in report["stages"] if s["would_run"]} == after
    assert {name for s in report["stages"] for name in s["changed"]} == {f"version {package}"}


@pytest.mark.slow
def test_a_weight_file_that_changed_or_went_is_named(hitoksr_tiny: Path, tmp_path: Path, capsys) -> None:
    folder = shutil.copytree(hitoksr_tiny / "weights" / "hitoksr", tmp_path / "mine")
    (file,) = folder.iterdir()
    build(Request("hitoksr", "tiny", tmp_path / "b", folder, verify="never"))
    name = f"weights hitoksr/{file.name}"
    assert not any(s["changed"] for s in explain(tmp_path / "b")["stages"])
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\1")
    sha256_of_file(file)
    report = explain(tmp_path / "b")
    assert {s["stage"]: s["changed"] for s in report["stages"] if s["changed"]} == {"attach": [name]}
    assert [s["stage"] for s in report["stages"] if s["would_run"]] == report["runs_again"][name]
    file.unlink()
    assert main(["export", "explain", str(tmp_path / "b")]) == 0
    assert f"changed since: {name}; attach, optimise, seal would run" in capsys.readouterr().out


def test_a_result_that_was_removed_from_the_cache_is_said_to_be_gone(hitoksr_tiny: Path, monkeypatch) -> None:
    note = note_of(hitoksr_tiny).read_text()
    monkeypatch.setattr("tilewright.export.build.cache.cache_dir", lambda: Path("/nowhere"))
    assert note_of(hitoksr_tiny).read_text() == note
    cached = {s["stage"]: s["cached"] for s in explain(hitoksr_tiny)["stages"]}
    assert cached == dict.fromkeys(cached, False) | {"seal": True}


def test_a_bundle_of_unknown_build_is_still_explained_by_its_engines(tinted, capsys) -> None:
    report = explain(tinted)
    assert (report["remembered"], report["stages"], report["runs_again"]) == (False, [], {})
    assert {name: c["chosen"] for name, c in report["components"].items()} == dict.fromkeys(
        ("paint", "see", "words"), "ort-float32"
    )
    assert main(["export", "explain", str(tinted)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"the cache here knows no build of {tinted}")
    assert lines[1:] == [f"{name}: ort-float32, the only one" for name in ("paint", "see", "words")]


def test_the_command_answers_in_json_and_as_tables(hitoksr_tiny: Path, capsys) -> None:
    assert main(["export", "explain", str(hitoksr_tiny), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == explain(hitoksr_tiny)
    assert main(["export", "explain", str(hitoksr_tiny)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:7]] == [
        *("stage", "attach", "constants", "trace", "optimise", "verify", "seal"),
    ]
    assert "no source file, package or weight file has changed since" in lines
