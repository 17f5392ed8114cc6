"""The commands that `export verify` prints after a failure: they run, and they show the fault without Tilewright."""

import json
import shlex
import shutil
import struct
import sys
from pathlib import Path

import pytest
from polygraphy.tools import main as polygraphy

from tilewright.cli.main import main
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.verify.engines import verify
from tilewright.export.verify.gate import require
from tilewright.runtime.errors import AccuracyError

pytestmark = pytest.mark.slow
GATE = "tilewright.export.verify.gate.RELATIVE_L2_GATE"


def run(command: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run a command of ours, or of Polygraphy, in a folder; return its exit code."""
    monkeypatch.chdir(folder)
    name, *words = shlex.split(command)
    if name == "tilewright":
        return main(words)
    assert name == "polygraphy"
    monkeypatch.setattr(sys, "argv", [name, *words])
    return int(polygraphy() or 0)


def with_nan(weights: Path, folder: Path) -> Path:
    """A copy of a folder of weights, with a NaN in a bias of the decoder."""
    (file,) = shutil.copytree(weights, folder).glob("*.safetensors")
    data = bytearray(file.read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    start = 8 + length + header["decoder.embed.bias"]["data_offsets"][0]
    data[start : start + 4] = struct.pack("<f", float("nan"))
    file.write_bytes(data)
    return folder


def test_numbers_that_are_not_finite_are_found_again_without_us(
    hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = with_nan(hitoksr_tiny / "weights" / "hitoksr", tmp_path / "weights")
    build(Request("hitoksr", "tiny", tmp_path / "b", weights, verify="never", allow_nonfinite=True))
    assert main(["export", "verify", str(tmp_path / "b")]) == 7
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("tilewright: "))
    write, repeat = line.partition("; to repeat it without Tilewright: ")[2].split(" && ")
    assert run(write, tmp_path, monkeypatch) == 0
    capsys.readouterr()
    assert run(repeat, tmp_path, monkeypatch) == 1
    assert "NaN Detected" in capsys.readouterr().out


def test_a_component_that_misses_its_gate_is_repeated_with_the_sizes_of_its_last_call(
    hitoksr_tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = verify(hitoksr_tiny)
    require(report, root=hitoksr_tiny)
    monkeypatch.setattr(GATE, 0.0)
    with pytest.raises(AccuracyError, match=r"^ort-float32: decode\.image: relative L2") as caught:
        require(report, root=hitoksr_tiny)
    codes = report["engines"]["ort-float32"]["components"]["decode"]["shapes"]["codes"]
    write, repeat = caught.value.repeat
    assert f"codes:[{','.join(map(str, codes))}]" in repeat
    assert run(write, tmp_path, monkeypatch) == 0
    assert run(repeat, tmp_path, monkeypatch) == 0
    assert "PASSED" in capsys.readouterr().out


def test_a_build_that_misses_the_gate_says_how_to_get_the_bundle_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GATE, 0.0)
    with pytest.raises(AccuracyError, match=r"relative L2 .*; --verify never builds the bundle, and"):
        build(Request("hitoksr", "tiny", tmp_path / "b", seed=41, verify="always"))
    assert not (tmp_path / "b").exists()
