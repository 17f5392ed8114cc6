"""`tilewright export lint` as a user types it: tables, JSON, exit codes."""

import json
import shutil
from pathlib import Path

import onnx
import pytest

from support.commands import refused
from support.faults import FAULTS
from support.forged import reseal
from support.planted import Planted
from tilewright.cli.main import main
from tilewright.export.onnx_folder import onnx_folder

LINT = ("export", "lint", "--target", "tensorrt")


def planted(graph: Path, *names: str) -> bytes:
    copy = Planted(onnx.load(graph, load_external_data=False))
    for name in names:
        FAULTS[name].plant(copy)
    return copy.model.SerializeToString()


@pytest.fixture
def faulty(hitoksr_tiny: Path, tmp_path: Path) -> Path:
    """A bundle whose graph `decode` has two cubic Resizes and a sum of two types."""
    root = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    reseal(root, "decode.onnx", planted(root / "decode.onnx", "cubic_resize", "cubic_resize", "sum_of_two_types"))
    return root


def test_without_findings_it_says_what_was_checked(hitoksr_tiny, capsys):
    assert main([*LINT, str(hitoksr_tiny)]) == 0
    heads, *rows, checked, summary = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["graph", "nodes", "operators"] and [row.split()[0] for row in rows] == [
        "decode",
        "generate",
    ]
    assert "restrictions of operators" in checked and summary == "no findings for TensorRT 10.16 and 11"
    assert main([*LINT, str(hitoksr_tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["findings"] == [] and report["versions"] == ["10.16", "11"]
    assert report["graphs"]["generate"]["plugins"] == 3


def test_findings_are_a_table_of_equal_ones_together_and_exit_6(faulty, capsys):
    assert main([*LINT, str(faulty)]) == 6
    said = capsys.readouterr()
    heads, add, resize, summary = said.out.splitlines()
    assert heads.split("  ")[0] == "graph" and add.startswith("decode")
    assert all(words in add for words in ("planted  ", "Add", "BF16", "cast all of them"))
    assert all(words in resize for words in ("planted and 1 more", "Resize", "mode 'cubic'", "a matrix of weights"))
    assert summary == "3 findings in 1 of 2 graphs for TensorRT 10.16 and 11"
    (line,) = said.err.splitlines()
    assert line.startswith(f"tilewright: {faulty}: 3 findings")


def test_findings_in_json_are_one_by_one_beside_the_error(faulty, capsys):
    assert main([*LINT, str(faulty), "--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert report["error"]["code"] == 6 and report["error"]["kind"] == "BuildError"
    assert [(f["graph"], f["node"], f["op"]) for f in report["findings"]] == [
        ("decode", "planted", "Add"),
        ("decode", "planted", "Resize"),
        ("decode", "planted", "Resize"),
    ]


@pytest.mark.slow
def test_a_folder_of_graphs_or_one_of_them_is_checked_where_its_weights_lie(hitoksr_tiny, tmp_path, capsys):
    folder = tmp_path / "onnx"
    onnx_folder(hitoksr_tiny, folder)
    assert main([*LINT, str(folder)]) == main([*LINT, str(folder / "decode.onnx")]) == 0
    (weights,) = folder.rglob("*.safetensors")
    weights.unlink()
    capsys.readouterr()
    assert main([*LINT, str(folder), "--json"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert {f["rule"] for f in report["findings"]} == {"places of weights"}
    assert len(report["findings"]) == sum(graph["external"] for graph in report["graphs"].values())


def test_what_is_no_graph_no_bundle_or_no_target_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "x.onnx").write_bytes(b"not a graph")
    refused(capsys, 3, "x.onnx: not an ONNX graph", *LINT, "bad")
    refused(capsys, 3, "nowhere: no bundle.json there", *LINT, "nowhere")
    refused(capsys, 2, "'nosuch'", "export", "lint", "bad", "--target", "nosuch")
    refused(capsys, 2, "--target", "export", "lint", "bad")


@pytest.mark.slow
def test_a_system_is_checked_in_the_sizes_of_a_preset_without_weights(hitoksr_tiny, capsys, monkeypatch):
    words = [*LINT, "hitoksr", "--preset", "tiny", "--precision", "bfloat16,fp8", "--json"]
    assert main(words) == 0
    report = json.loads(capsys.readouterr().out)
    graphs = report["graphs"]
    assert graphs.keys() == {
        f"{name} {precision}" for name in ("generate", "decode") for precision in ("bfloat16", "fp8")
    }
    assert report["findings"] == [] and (report["system"], report["preset"]) == ("hitoksr", "tiny")
    assert graphs["decode bfloat16"]["plugins"] == 2 and graphs["decode fp8"]["plugins"] == 0
    assert graphs["decode fp8"]["nodes"] > graphs["decode bfloat16"]["nodes"]
    # a Cast behind DequantizeLinear is found
    place = "tilewright.export.graph.rewrites.sixteen_bits._Shortened.dequantised"
    monkeypatch.setattr(place, lambda *arguments: False)
    assert main([*words, "--precision", "fp8"]) == 6
    report = json.loads(capsys.readouterr().out)
    assert {f["rule"] for f in report["findings"]} == {"fusion of quantized weights"}


def test_options_of_systems_and_of_bundles_do_not_mix(hitoksr_tiny, capsys):
    refused(capsys, 2, "--precision is for a system with --preset", *LINT, str(hitoksr_tiny), "--precision", "float32")
    refused(capsys, 2, "--expect and --weights-dir are for bundles", *LINT, "toksr", "--preset", "x", "--expect", "0")
    refused(capsys, 2, "--precision 'int4' is not one of", *LINT, "toksr", "--preset", "tiny", "--precision", "int4")
    refused(capsys, 2, "preset 'huge' of hitoksr is not one of", *LINT, "hitoksr", "--preset", "huge")
    refused(capsys, 2, "system 'nosuch' is not one of", *LINT, "nosuch", "--preset", "tiny")
