"""Charts and the page of a report, from facts of a system that takes steps."""

import re
from pathlib import Path
from typing import Any

import pytest

from support.html import Page
from support.layered import layered
from tilewright.calib.report.charts import Dot, heat_map, lines
from tilewright.calib.report.page import page
from tilewright.cli.main import main

GATE = {
    "images": ["a.png"],
    "threads": 1,
    "processor": "a <fast> one",
    "budget_db": 45.0,
    "engines": {
        "ort-float32": {"precision": "float32", "mean_db": 200.0, "worst_db": 200.0, "drift": {"z": [0.0, 0.0]}},
        "ort-int8": {
            "precision": "int8",
            "mean_db": 44.0,
            "worst_db": 43.0,
            "drift": {"z": [1e-3, 2e-2]},
            "low_share": 0.9,
            "low_share_of_all": 0.8,
            "fault": "44.0 dB against float32",
            "slower_than": None,
        },
    },
}
COMMON = {"ssim": 0.99, "changed_choices": None, "seconds": 2.0, "peak_bytes": 2**27}
LAYER = {"weight": "int8", "kind": "linear", "inputs": ["step/x"], "share": 1.0, "why": ""}
ENTRY = {"scale": 0.1, "range": [-12.7, 12.7], "method": "mse", "smoothed": 0}


@pytest.fixture
def facts() -> dict[str, Any]:
    engines: dict[str, Any] = {name: COMMON | engine for name, engine in GATE["engines"].items()}  # type: ignore[attr-defined]
    inputs = {"step/x": ENTRY | {"largest": [8.0, 4.0, 1.0]}, "step/y": ENTRY | {"largest": [1.0, 1.0, 1.0]}}
    recipe = {"layers": {"step/w": LAYER}, "quantised": 1, "share": 0.8, "linear_share": 1.0, "budget_db": None}
    recipe |= {"groups": [], "frontier": [], "chosen": None, "inputs": inputs}
    return {
        "bundle": "f" * 64,
        "system": "in-token",
        "recipes": {"int8": recipe},
        "engines": {"int8": []},
        "gate": GATE | {"engines": engines},
        "stale": True,
    }


def test_the_page_shows_what_there_is_and_no_more(facts: dict[str, Any], tmp_path: Path) -> None:
    text = page(facts, tmp_path)
    shown = Page(text)
    assert shown.titles == ["Engines", "Drift", "Scale per step", "Plan"]
    assert shown.classes["verdict miss"] == 2  # it misses the budget, and it was judged before a change
    assert "a &lt;fast&gt; one" in text and shown.classes["cell"] == 6 and not shown.elsewhere
    judged_later = page(facts | {"gate": None, "stale": False}, tmp_path)
    assert Page(judged_later).titles == ["Scale per step", "Plan"] and "not judged yet" in judged_later


def test_points_lie_where_their_numbers_say() -> None:
    dots = [Dot(0.0, 40.0, "a"), Dot(0.5, 45.0, "b"), Dot(1.0, 50.0, "c<", label="c<")]
    chart = lines({"line-0": dots}, "x", "y", rule=42.0, rule_text="least", percent=True)
    x = [float(at) for at in re.findall(r'cx="([\d.]+)"', chart)]
    y = [float(at) for at in re.findall(r'cy="([\d.]+)"', chart)]
    rule = float(re.search(r'class="rule".*?y1="([\d.]+)"', chart)[1])  # type: ignore[index]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2)
    assert (y[0] - rule) / (y[0] - y[2]) == pytest.approx(0.2, abs=0.01)
    assert ">0%<" in chart and ">100%<" in chart and "c&lt;" in chart


def test_a_chart_of_one_point_and_of_powers_has_a_scale() -> None:
    assert "nan" not in lines({"alone": [Dot(1.0, 50.0, "a")]}, "x", "y", percent=True)
    chart = lines({"line-0": [Dot(1, 1e-4, ""), Dot(2, 1e-3, ""), Dot(3, 1e-2, "")]}, "step", "y", powers=True)
    y = [float(at) for at in re.findall(r'cy="([\d.]+)"', chart)]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2) and ">1e-3<" in chart


def test_cells_fade_with_each_factor_of_two() -> None:
    chart = heat_map({"x": [8.0, 4.0, 2.0, 0.0]}, {"x": "0.1"})
    depth = [float(at) for at in re.findall(r'fill-opacity="([\d.]+)"', chart)]
    assert depth[0] == 1 and depth[0] - depth[1] == pytest.approx(depth[1] - depth[2], abs=0.02)
    assert depth[3] == 0.06


def test_a_bundle_without_such_engines_has_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = layered(tmp_path / "layers.bundle")
    assert main(["calib", "report", str(root)]) == 2
    assert "has no engine in int8 or fp8; add one with" in capsys.readouterr().err
