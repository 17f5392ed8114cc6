"""Builds: same inputs same bytes, weights by reference, killed builds, gates."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.build.stages import stages
from tilewright.export.cli import main
from tilewright.export.verify.engines import require
from tilewright.runtime import load
from tilewright.runtime.bundle import read
from tilewright.runtime.errors import AccuracyError, InputError, ResourceError, UsageError
from tilewright.runtime.memory import available_bytes

KILLS = 20
# seconds a stage takes, about
LASTS = {"trace": 6.0, "attach": 0.02, "constants": 0.02, "optimise": 0.5, "verify": 1.0, "seal": 0.05}


def tree(root: Path) -> dict[str, bytes]:
    """Every sealed byte of a bundle."""
    kept = (f for f in root.rglob("*") if f.is_file() and "reports" not in f.parts and f.name != "README.md")
    return {str(f.relative_to(root)): f.read_bytes() for f in kept}


def test_the_same_inputs_give_the_same_bytes_from_an_empty_cache(
    hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    build(Request("hitoksr", "tiny", tmp_path / "again", seed=0))
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
    from safetensors.numpy import load_file, save_file

    tensors = load_file(hitoksr_tiny / "weights" / "hitoksr" / "hitoksr.safetensors")
    extra = {"encoder.embed.weight": next(iter(tensors.values()))}
    (tmp_path / "mine").mkdir()
    save_file(tensors | extra, tmp_path / "mine" / "all.safetensors")
    build(Request("hitoksr", "tiny", tmp_path / "b", tmp_path / "mine", pack=True))
    shutil.rmtree(tmp_path / "mine")
    packed = load_file(tmp_path / "b" / "weights" / "hitoksr" / "hitoksr.safetensors")
    assert packed.keys() == tensors.keys()
    assert all((packed[name] == tensors[name]).all() for name in tensors)
    assert read(tmp_path / "b").weights_folder("decode") == tmp_path / "b" / "weights" / "hitoksr"


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
    assert report["components"]["decode"]["outputs"]["image"]["relative_l2"] <= 1e-5
    assert {r.dtype for r in read(tmp_path / "b").weights.tensors["decode"].values()} == {dtype}


def test_a_killed_build_is_finished_by_the_next(tmp_path: Path) -> None:
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(tmp_path / "cache")}
    out, built = tmp_path / "b", tmp_path / "cache" / "build"
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(out)]
    command = [sys.executable, "-m", "tilewright.export.cli", *words]
    moments, killed = random.Random(0), 0
    for attempt in range(KILLS):
        stage = list(LASTS)[attempt % len(LASTS)]
        shutil.rmtree(built / stage, ignore_errors=True)  # so that it runs again
        shutil.rmtree(built / ("graph" if stage == "trace" else "none"), ignore_errors=True)
        running = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        assert running.stderr is not None
        assert any(line.split() == [stage, "started"] for line in running.stderr)
        time.sleep(moments.uniform(0, LASTS[stage]))
        running.kill()
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
        if out.exists():
            read(out)  # a bundle that is there is whole
            shutil.rmtree(out)
    assert killed > KILLS // 2
    subprocess.run(command, env=environment, check=True, capture_output=True)
    verified = [sys.executable, "-m", "tilewright.export.cli", "export", "verify", str(out)]
    subprocess.run(verified, env=environment, check=True, capture_output=True)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert list(built.rglob("*.part")) == []


def test_a_stage_key_follows_every_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {s.name: s.key for s in stages(Request("hitoksr", "tiny", tmp_path / "b", seed=0))}
    seed = {s.name: s.key for s in stages(Request("hitoksr", "tiny", tmp_path / "b", seed=1))}
    assert seed["trace"] == plan["trace"]
    assert all(seed[name] != plan[name] for name in ("attach", "constants", "optimise", "verify", "seal"))
    monkeypatch.setattr("tilewright.export.build.stages._version", lambda package: "another")
    other = {s.name: s.key for s in stages(Request("hitoksr", "tiny", tmp_path / "b", seed=0))}
    assert all(other[name] != plan[name] for name in plan)


def test_wrong_weights_are_refused_by_name(hitoksr_tiny: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

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
    monkeypatch.setattr("tilewright.export.build.run.available_bytes", lambda: 10_000_000)
    with pytest.raises(ResourceError, match="GiB"):
        build(Request("hitoksr", "tiny", tmp_path / "b", seed=77, verify="always"))


def test_an_engine_that_differs_is_refused(hitoksr_tiny: Path) -> None:
    report = json.loads((hitoksr_tiny / "reports" / "accuracy.json").read_text())
    require(report)
    for path, value, said in [
        (("components", "decode", "outputs", "image", "relative_l2"), 1e-3, "relative L2"),
        (("components", "decode", "outputs", "image", "relative_l2"), float("nan"), "relative L2"),
        (("components", "generate", "choices", "wrong"), 1, "choices"),
        (("restore", "deviation"), 0.0, "constant"),
        (("restore", "deviation"), float("nan"), "constant"),
    ]:
        changed = json.loads(json.dumps(report))
        place = changed
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(AccuracyError, match=said):
            require(changed)


def test_verification_notices_an_engine_that_computes_something_else(
    hitoksr_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    from tilewright.export.verify.engines import verify
    from tilewright.runtime.bundle import write_manifest

    bundle = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    file = bundle / "decode" / "model.onnx"  # ONNX Runtime's too: it had nothing to rewrite
    model = onnx.load(file, load_external_data=False)
    gain = next(n for n in model.graph.node if n.op_type == "RMSNormalization")
    next(a for a in gain.attribute if a.name == "epsilon").f = 0.3
    onnx.save(model, file)
    write_manifest(bundle, read(hitoksr_tiny).manifest)
    with pytest.raises(AccuracyError, match=r"decode\.image"):
        require(verify(bundle))
    capsys.readouterr()
    assert main(["export", "verify", str(bundle)]) == AccuracyError.exit_code == 7
    assert capsys.readouterr().err.startswith("tilewright: decode.image: relative L2")


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
    assert not (tmp_path / "b").exists() and not list((tmp_path / "cache" / "build").glob("*/*"))


def test_a_bundle_too_large_to_verify_is_refused_before_it_is_tried(
    hitoksr_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilewright.export.verify.engines import verify

    monkeypatch.setattr("tilewright.export.verify.engines.available_bytes", lambda: 1_000_000)
    with pytest.raises(ResourceError, match="verifying needs about"):
        verify(hitoksr_tiny)
