"""The percentiles of a profile, against their definition; the table and the JSON agree."""

import numpy as np
import pytest

from tilewright.runtime import load
from tilewright.runtime.atlas import atlas, atlas_table
from tilewright.runtime.errors import UsageError
from tilewright.runtime.profile import _row, profile


def measured(runs):
    seconds = np.random.default_rng(0).permutation(np.arange(1, runs + 1) / 100)
    return _row([{"total": float(s), "read": 0.5} for s in seconds], (20, 30, 3), {"restore": 1})["seconds"]


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        (5, ["p50", "max"]),
        (19, ["p50", "max"]),
        (20, ["p50", "p90", "max"]),
        (199, ["p50", "p90", "max"]),
        (200, ["p50", "p90", "p99", "max"]),
    ],
)
def test_a_percentile_is_told_only_where_runs_lie_beyond_it(runs, names):
    seconds = measured(runs)
    assert list(seconds) == names
    assert seconds["max"] == runs / 100
    for name in names[:-1]:
        below = np.count_nonzero(np.arange(1, runs + 1) / 100 <= seconds[name] + 1e-9)
        assert below == pytest.approx(runs * int(name[1:]) / 100, abs=1)


def test_the_table_shows_what_the_profile_holds(bundle):
    with load(bundle, devices=["cpu:0", "cpu:1"], threads=1) as restorer:
        told = profile(restorer, [(64, 64), (96, 48)], runs=20)
        with pytest.raises(UsageError, match="runs=4 is not a whole number of at least 5"):
            profile(restorer, [(64, 64)], runs=4)
    assert told["devices"] == ["cpu:0", "cpu:1"]
    assert told["engine"].startswith("onnxruntime ") and list(told["engines"]) == ["sharpen"]
    first, setting, heads, *rows = atlas_table(atlas([told])).splitlines()
    name = f"{told['engines']['sharpen']}, 2 devices, batch 1"
    assert setting == f"{name}, 1 thread(s) each, {told['engine']}, memory fast"
    assert first.endswith("20 runs of each size")
    columns = heads.replace(" s", "").replace("peak MiB", "peak").split()
    shown = ["first", "images/s", "Mpx/s", "peak", "waste", "outside"]
    assert columns == ["resolution", "tiles", "p50", "p90", "max", *shown]
    for line, row in zip(rows, told["resolutions"], strict=True):
        cells = dict(zip(columns, line.split(), strict=False))
        assert cells["resolution"] == f"{row['width']}x{row['height']}"
        for name in ("p50", "p90", "max"):
            assert cells[name] == f"{row['seconds'][name]:.3f}"
