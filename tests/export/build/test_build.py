"""Builds: same inputs same bytes, weights by reference, refusals before anything is written."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tilewright.cli.main import main
from tilewright.export.build.clean import clean
from tilewright.export.build.forecast import GRAPH_BYTES, forecast
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.build.stage_list import list_stages
from tilewright.runtime import load
from tilewright.runtime.bundle.digests import cache_dir
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.memory.machine import available_bytes

pytestmark = pytest.mark.slow


def tree(root: Path) -> dict[str, bytes]:
    """Every sealed byte of a bundle."""
    kept = (f for f in root.rglob("*") if f.is_file() and "reports" not in f.parts and f.name != "README.md")
    return {str(f.relative_to(root)): f.read_bytes() for f in kept}


def test_the_same_inputs_give_the_same_bytes_from_an_empty_cache_in_another_process_and_hashes_of_strings(
    hitoksr_tiny: Path, tmp_path: Path
) -> None:
    options = ("--preset", "tiny", "--random-weights", "0", "--target", "ort", "--precision", "float32")
    words = ["export", "build", "hitoksr", *options, "-o", str(tmp_path / "again")]
    environment = os.environ | {"PYTHONHASHSEED": "12345", "TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "tilewright", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "again") == tree(hitoksr_tiny)


def test_weights_given_by_folder_are_not_copied(hitoksr_tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hitoksr_tiny / "weights" / "hitoksr", tmp_path / "mine")
    build(Request("hitoksr", "tiny", tmp_path / "b", folder))
    assert not list((tmp_path / "b").rglob("*.safetensors"))
    assert sum(f.stat().st_size for f in (tmp_path / "b").rglob("*.onnx")) < 5_000_000
    sample = Path(__file__).parents[3] / "docs" / "sample.png"
    with load(hitoksr_tiny) as packed, load(tmp_path / "b") as referenced:
        assert (packed(sample) == referenced(sample)).all()
    shutil.move(folder, tmp_path / "moved")
    with load(tmp_path / "b", weights_dir=tmp_path / "moved") as found:
        assert found(sample).shape == (512, 512, 3)


def test_pack_copies_only_what_is_read(hitoksr_tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors")
    extra = {"encoder.embed.weight": next(iter(tensors.values()))}
    (tmp_path / "mine").mkdir()
    save_file(tensors | extra, tmp_path / "mine" / "all.safetensors")
    build(Request("hitoksr", "tiny", tmp_path / "b", tmp_path / "mine", pack=True))
    shutil.rmtree(tmp_path / "mine")
    packed = load_file(tmp_path / "b" / "weights" / "hitoksr" / "hitoksr.safetensors")
    assert packed.keys() == tensors.keys()
    assert all((packed[name] == tensors[name]).all() for name in tensors)
    assert read_bundle(tmp_path / "b").folder("hitoksr") == tmp_path / "b" / "weights" / "hitoksr"


def test_the_build_reports_the_nodes_of_each_graph(hitoksr_tiny: Path) -> None:
    import onnx

    nodes = json.loads((hitoksr_tiny / "reports" / "nodes.json").read_text())
    files = {("generate", "portable"): "generate.onnx", ("decode", "portable"): "decode.onnx"}
    files["generate", "ort"] = "engines/generate.ort/model.onnx"
    for (component, form), file in files.items():
        graph = onnx.load(hitoksr_tiny / file, load_external_data=False).graph
        assert nodes[component][form] == len(graph.node) < nodes[component]["traced"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_stored_in_half_precision_are_read_as_they_lie(hitoksr_tiny: Path, tmp_path: Path, dtype: str) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors")
    (tmp_path / "mine").mkdir()
    save_file({k: t.to(getattr(torch, dtype)) for k, t in tensors.items()}, tmp_path / "mine" / "half.safetensors")
    build(Request("hitoksr", "tiny", tmp_path / "b", tmp_path / "mine"))
    report = json.loads((tmp_path / "b" / "reports" / "accuracy.json").read_text())
    # both compute in float32 over the same rounded weights
    assert report["engines"]["ort-float32"]["components"]["decode"]["outputs"]["image"]["relative_l2"] <= 1e-5
    assert {r.dtype for r in read_bundle(tmp_path / "b").weights.tensors["decode"].values()} == {dtype}


def test_wrong_weights_are_refused_by_name(hitoksr_tiny: Path, tmp_path: Path) -> None:
    tensors = load_file(hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors")
    tensors.pop("decoder.embed.bias")
    save_file(tensors, tmp_path / "less.safetensors")
    with pytest.raises(InputError, match=r"lacks 1 tensors: decoder\.embed\.bias"):
        build(Request("hitoksr", "tiny", tmp_path / "b", tmp_path / "less.safetensors"))
    assert not (tmp_path / "b").exists()


def test_a_folder_with_something_else_is_not_overwritten(hitoksr_tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="not a bundle"):
        build(Request("hitoksr", "tiny", tmp_path / "mine", seed=0))
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_a_build_that_cannot_fit_is_refused_before_it_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert available_bytes() is not None
    monkeypatch.setattr("tilewright.export.build.preflight.available_bytes", lambda: 10_000_000)
    with pytest.raises(ResourceError, match="GiB"):
        build(Request("hitoksr", "tiny", tmp_path / "b", seed=77, verify="always"))


def test_a_network_that_cannot_be_traced_is_one_line_and_exit_6(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))

    def fail(source: object) -> None:
        raise RuntimeError("a data-dependent branch\nand thirty lines more")

    monkeypatch.setattr("tilewright.export.graph.trace.trace", fail)
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(tmp_path / "b")]
    assert main(words) == 6
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tilewright:")]
    assert len(said) == 1 and "hitoksr.generate" in said[0] and "a data-dependent branch" in said[0]
    assert not (tmp_path / "b").exists()
    done = {path.parent.name for path in (tmp_path / "cache" / "build").glob("*/*")}
    assert done == {"parameters", "attach", "constants"}  # finished stages stay, and nothing of the one that failed


def test_another_tools_folder_with_a_bundle_json_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for text in ('{"name": "a bundler\'s own"}', "no JSON", "[]"):
        (tmp_path / "mine" / "bundle.json").write_text(text)
        with pytest.raises(UsageError, match="not a bundle of tilewright"):
            build(Request("hitoksr", "tiny", tmp_path / "mine", seed=0))
        assert (tmp_path / "mine" / "bundle.json").read_text() == text


def test_packing_after_a_build_without_is_not_up_to_date(hitoksr_tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hitoksr_tiny / "weights" / "hitoksr", tmp_path / "mine")
    request = Request("hitoksr", "tiny", tmp_path / "b", folder, verify="never")
    assert build(request)
    assert not build(Request("hitoksr", "tiny", tmp_path / "b", folder, verify="never"))
    assert build(Request("hitoksr", "tiny", tmp_path / "b", folder, verify="never", pack=True))
    assert list((tmp_path / "b" / "weights").rglob("*.safetensors"))


@pytest.mark.parametrize("file", ["bundle.json", "program.json", "decode.onnx"])
def test_a_damaged_bundle_is_built_again(tmp_path: Path, file: str) -> None:
    request = Request("hitoksr", "tiny", tmp_path / "b", seed=0)
    build(request)
    assert not build(request)
    whole = (tmp_path / "b" / file).read_bytes()
    (tmp_path / "b" / file).write_bytes(whole[:-9] + b"x" + whole[-8:])
    assert build(request).keys() == {"seal"}
    assert (tmp_path / "b" / file).read_bytes() == whole


def test_a_bundle_that_another_request_put_there_is_replaced(tmp_path: Path) -> None:
    mine, other = (Request("hitoksr", "tiny", tmp_path / name, seed=0) for name in ("mine", "other"))
    build(mine)
    build(Request("hitoksr", "tiny", tmp_path / "other", seed=0, ops="standard", verify="never"))
    shutil.rmtree(tmp_path / "mine")
    shutil.copytree(tmp_path / "other", tmp_path / "mine")
    assert build(mine).keys() == {"seal"} and build(other)


def test_what_is_in_use_is_touched_so_that_clean_spares_it(
    cache: Path, hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished = {"copy_function": os.link, "ignore": shutil.ignore_patterns(".*")}  # hidden is what others are making
    shutil.copytree(cache / "build" / "graph", tmp_path / "cache" / "build" / "graph", **finished)  # no trace again
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    request = Request("hitoksr", "tiny", tmp_path / "b", seed=0, verify="never")
    build(request)
    for folder in (tmp_path / "cache" / "build").glob("*/*"):
        os.utime(folder, (0, 0))
    build(Request("hitoksr", "tiny", tmp_path / "c", seed=0, verify="never"))
    clean(1.0)
    assert build(Request("hitoksr", "tiny", tmp_path / "d", seed=0, verify="never")).keys() == {"seal"}
    with pytest.raises(UsageError, match="must be 0 or more days"):
        clean(-1.0)
    with pytest.raises(UsageError, match="must be 0 or more days"):
        clean(float("nan"))
    assert clean().freed_bytes > 0
    left = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == []


def test_the_forecast_counts_every_byte_once(hitoksr_tiny: Path, tmp_path: Path) -> None:
    def predicted(request: Request) -> tuple[int, int]:
        plan = list_stages(request)
        disk = forecast(request, plan, up_to_date=False).disk
        return disk.get(cache_dir(), 0) - GRAPH_BYTES, disk[request.out] - GRAPH_BYTES

    packed = hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors"
    data = sum(length for *_, length in safetensors_header(packed).values())
    assert predicted(Request("hitoksr", "tiny", tmp_path / "b", seed=987)) == (data, data)
    folder = shutil.copytree(packed.parent, tmp_path / "mine")
    assert predicted(Request("hitoksr", "tiny", tmp_path / "b", folder)) == (0, 0)
    assert predicted(Request("hitoksr", "tiny", tmp_path / "b", folder, pack=True)) == (data, data)


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(ResourceError, match="make room"):
        build(Request("hitoksr", "tiny", tmp_path / "b", seed=986))
    assert not (tmp_path / "b").exists()


def test_wrong_files_are_found_before_anything_is_traced_or_read(
    hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = load_file(hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors")
    tensors["decoder.embed.bias"] = tensors["decoder.embed.bias"][:-1]
    save_file(tensors, tmp_path / "other.safetensors")

    def fail(*_: object) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr("tilewright.export.graph.trace.trace", fail)
    monkeypatch.setattr("tilewright.runtime.bundle.digests._sha256", fail)
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--weights", str(tmp_path / "other.safetensors")]
    for more in ([], ["--dry-run"]):
        assert main([*words, "-o", str(tmp_path / "b"), *more]) == InputError.exit_code
    assert not (tmp_path / "b").exists()


def test_without_a_home_a_build_works_where_the_cache_is_named(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(tmp_path / "b")]
    command = [sys.executable, "-m", "tilewright.cli.main", *words, "--dry-run"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
