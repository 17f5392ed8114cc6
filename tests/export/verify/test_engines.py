"""What `verify` says of engines, and what it refuses."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tilewright.cli.main import main
from tilewright.export.verify.eager import eager_network
from tilewright.export.verify.engines import verify
from tilewright.export.verify.gate import require
from tilewright.export.verify.paired import Paired
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import write_manifest
from tilewright.runtime.errors import AccuracyError, ResourceError


def test_an_engine_that_differs_is_refused(hitoksr_tiny: Path) -> None:
    report = json.loads((hitoksr_tiny / "reports" / "accuracy.json").read_text())
    require(report)
    for path, value, said in [
        (("components", "decode", "outputs", "image", "relative_l2"), 1e-3, "decode.image: relative L2"),
        (("components", "decode", "outputs", "image", "relative_l2"), float("nan"), "relative L2"),
        (("components", "generate", "choices", "wrong"), 1, "choices"),
        (("restore", "deviation"), 0.0, "constant"),
        (("restore", "deviation"), float("nan"), "constant"),
    ]:
        changed = json.loads(json.dumps(report))
        place = changed["engines"]["ort-float32"]
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        with pytest.raises(AccuracyError, match=said):
            require(changed)


def test_an_engine_in_bfloat16_is_judged_by_its_picture(hitoksr_tiny: Path) -> None:
    report = json.loads((hitoksr_tiny / "reports" / "accuracy.json").read_text())
    engine = report["engines"]["ort-float32"]
    engine["precision"] = "bfloat16"
    engine["components"]["decode"]["outputs"]["image"]["relative_l2"] = 1e-2
    engine["components"]["generate"]["choices"]["wrong"] = 9
    engine["restore"]["psnr_db"] = 40.0
    require(report)
    engine["restore"]["psnr_db"] = 39.9
    with pytest.raises(AccuracyError, match=r"^ort-float32: the restored picture has 39\.9 dB .*, the gate is 40 dB"):
        require(report)
    require(report, ("float32",))


@pytest.mark.slow
def test_verification_notices_an_engine_that_computes_something_else(
    hitoksr_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import onnx

    bundle = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    file = bundle / "decode.onnx"  # ONNX Runtime's too: it had nothing to rewrite
    model = onnx.load(file, load_external_data=False)
    gain = next(n for n in model.graph.node if n.op_type == "RMSNormalization")
    next(a for a in gain.attribute if a.name == "epsilon").f = 0.3
    onnx.save(model, file)
    write_manifest(bundle, read_bundle(hitoksr_tiny).manifest)
    with pytest.raises(AccuracyError, match=r"decode\.image"):
        require(verify(bundle))
    capsys.readouterr()
    assert main(["export", "verify", str(bundle)]) == AccuracyError.exit_code == 7
    assert capsys.readouterr().err.startswith("tilewright: ort-float32: decode.image: relative L2")


def test_choices_by_scores_that_are_not_finite_are_refused(hitoksr_tiny: Path) -> None:
    eager = eager_network(read_bundle(hitoksr_tiny), "generate", None)
    name, weight = next((n, p) for n, p in eager.network.named_parameters() if p.dim() == 2)
    module, _, parameter = name.rpartition(".")
    broken = torch.nn.Parameter(torch.full_like(weight, torch.nan))
    setattr(eager.network.get_submodule(module), parameter, broken)
    image = np.random.Generator(np.random.Philox(key=0)).random((1, 3, 64, 64), np.float32)
    with pytest.raises(AccuracyError, match=r"^the scores .* are not finite in eager PyTorch; check the weights"):
        Paired({}, eager).run({"image": image}, eager.names)


def test_a_bundle_too_large_to_verify_is_refused_before_it_is_tried(
    hitoksr_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilewright.export.verify.engines.available_bytes", lambda: 1_000_000)
    with pytest.raises(ResourceError, match="verifying needs about"):
        verify(hitoksr_tiny)
