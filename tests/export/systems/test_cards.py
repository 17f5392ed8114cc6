"""The cards of the five systems' tiny bundles: hubs read them, and every command in them runs."""

import json
from pathlib import Path

import pytest

from support.cards import check_card
from support.systems import EVERY_SYSTEM
from tilewright.export.build.request import Request
from tilewright.export.build.run import build


@pytest.mark.slow
@pytest.mark.parametrize("system", EVERY_SYSTEM)
def test_the_card_of_a_tiny_bundle_is_read_by_hubs_and_runs(
    system: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture = f"{system.replace('-', '_')}_tiny"
    (tmp_path / "here").mkdir()
    if system == "toksr":
        bundle = tmp_path / "toksr tiny"  # a name that a shell would take for two
        build(Request("toksr", "tiny", bundle, seed=0, verify="never"))
    else:
        bundle = request.getfixturevalue(fixture)
    card = check_card(bundle, tmp_path / "here", monkeypatch)
    data, manifest = card.data, json.loads((bundle / "bundle.json").read_text())
    assert (data.library_name, data.pipeline_tag) == ("tilewright", "image-to-image")
    assert {"image-restoration", system} <= set(data.tags)
    assert (data.license, data.license_name) == ("other", manifest["licence"])
    random = manifest["options"]["weights"].startswith("random")
    assert (data.base_model is None) == random  # random weights come from no model
    report = bundle / "reports" / "accuracy.json"
    if report.is_file():
        measured = json.loads(report.read_text())
        judged = measured["engines"]["ort-float32"]
        restored = judged["restore"]
        row = f"| ort-float32: the restored picture | {restored['psnr_db']:.1f} dB | {restored['relative_l2']:.1e} |"
        assert row in card.text and measured["image"] in card.text
        outputs = [d["relative_l2"] for c in judged["components"].values() for d in c["outputs"].values()]
        assert f"| {max(outputs):.1e} |" in card.text
    else:
        assert "Not verified against eager PyTorch" in card.text
