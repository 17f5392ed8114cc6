"""Atlases: interpolation, differences beyond noise, and the page."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu

from tilewright.runtime.atlas import _chance, atlas, atlas_table, diff, diff_table, interpolated
from tilewright.runtime.atlas_page import page
from tilewright.runtime.errors import InputError


def row(side: int, seconds: list[float], peak: int = 2**27) -> dict:
    p50 = float(np.median(seconds))
    return {
        "width": side,
        "height": side,
        "seconds": {"p50": p50, "max": max(seconds)},
        "runs_s": seconds,
        "images_per_second": 1 / p50,
        "megapixels_per_second": side * side / 1e6 / p50,
        "first_part_s": p50 / 2,
        "outside_engines": 0.25,
        "computed_px": side * side * 2,
        "waste": {"restore": 1.0},
        "phases": {"read": 0.01, "passes": p50 * 0.9, "assemble": 0.01, "generate": p50 * 0.6},
        "peak_bytes": peak,
        "tiles": {"restore": 4},
    }


def measured(rows: list[dict], devices: int = 1, **changes) -> dict:
    return {
        "bundle": "ab" * 32,
        "system": "hitoksr",
        "preset": "tiny <&>",
        "engine": "onnxruntime 1.31",
        "engines": {"generate": "ort-float32"},
        "devices": [f"cpu:{i}" for i in range(devices)],
        "batch": 1,
        "threads": 1,
        "memory": "fast",
        "hardware": {"cpu": "A CPU", "cores": 2, "system": "Linux"},
        "when": "2026-11-28",
        "runs": 5,
        "resolutions": rows,
    } | changes


def law(side: int) -> list[float]:
    """Five runs whose median grows with the pixels to the power of 1.2."""
    return [1e-7 * (side * side) ** 1.2 * share for share in (0.98, 0.99, 1, 1.01, 1.02)]


def test_a_power_of_the_pixels_is_interpolated_without_error() -> None:
    document = atlas([measured([row(side, law(side)) for side in (1024, 256, 512)])])
    assert document["settings"][0]["interpolation"]["errors"] == {"512x512": pytest.approx(0, abs=1e-9)}
    rows = document["settings"][0]["resolutions"]
    assert interpolated(rows, 700 * 700 * 2) == pytest.approx(law(700)[2])
    assert interpolated(rows, 100 * 100) is None and interpolated(rows, 5000 * 5000) is None
    assert "off by at most 0%, leaving one size out" in atlas_table(document)


def test_a_size_that_lies_off_the_line_shows_as_an_error() -> None:
    rows = [row(side, law(side)) for side in (256, 512, 1024)]
    rows[1] = row(512, [2 * t for t in law(512)])
    assert atlas([measured(rows)])["settings"][0]["interpolation"]["largest"] == pytest.approx(0.5)
    two = atlas([measured(rows[:2])])
    assert two["settings"][0]["interpolation"] == {"errors": {}, "largest": None}


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_the_chance_is_that_of_mann_and_whitney(n: int, m: int, seed: int) -> None:
    old, new = (np.random.default_rng(seed + i).permutation(100)[:k] + i / 2 for i, k in enumerate((n, m)))
    right = mannwhitneyu(old, new, method="exact").pvalue
    assert _chance(old.tolist(), new.tolist()) == pytest.approx(right, rel=1e-9)


def test_the_chance_of_many_runs_is_close_to_the_exact_one() -> None:
    generator = np.random.default_rng(0)
    old, new = generator.normal(0, 1, 40).tolist(), generator.normal(0.5, 1, 40).tolist()
    assert _chance(old, new) == pytest.approx(mannwhitneyu(old, new, method="asymptotic").pvalue, rel=1e-6)


@pytest.mark.parametrize(
    ("factor", "verdict"),
    [(1.5, "slower"), (0.5, "faster"), (1.001, "no difference beyond noise"), (1.015, "no difference beyond noise")],
)
def test_a_difference_is_told_if_it_is_beyond_noise_and_not_tiny(factor: float, verdict: str) -> None:
    old = atlas([measured([row(256, law(256))])])
    new = atlas([measured([row(256, [factor * t for t in law(256)], peak=2**28)])])
    changes = diff(old, new)
    assert [r["verdict"] for r in changes["rows"]] == [verdict]
    assert f"({factor - 1:+.1%}): {verdict}; 100% more memory" in diff_table(changes)


def test_sizes_and_settings_that_only_one_measured_are_counted() -> None:
    old = atlas([measured([row(256, law(256))])])
    new = atlas([measured([row(256, law(256)), row(512, law(512))]), measured([row(256, law(256))], devices=2)])
    changes = diff(old, new)
    assert len(changes["rows"]) == 1 and changes["not_in_both"] == 2 and changes["differs"] == []
    with pytest.raises(InputError, match="the two profiles share no size"):
        diff(old, atlas([measured([row(256, law(256))], devices=2)]))
    other = atlas([measured([row(256, law(256))], bundle="cd" * 32)])
    assert diff_table(diff(old, other)).startswith("note: the bundle of the two differ")


def test_the_page_needs_nothing_else_and_shows_every_number() -> None:
    profiles = [measured([row(side, law(side)) for side in (256, 512, 1024)], devices=n) for n in (1, 2)]
    text = page(atlas(profiles))
    opened: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attributes: list) -> None:
            opened.extend([tag] if tag != "meta" else [])

        def handle_startendtag(self, tag: str, attributes: list) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    Reader().feed(text)
    assert opened == [] and "<script" not in text and not re.search(r"https?://|src=|href=|url\(", text)
    assert "tiny &lt;&amp;&gt;" in text and text.count("<svg") > 4
    for profile in profiles:
        for each in profile["resolutions"]:
            assert f"<td>{each['seconds']['p50']:.3f}</td>" in text
    assert text.count("<td>1024x1024</td>") == 2
    assert not re.search(r"(nan|inf)\b", text.split("</style>")[1])
