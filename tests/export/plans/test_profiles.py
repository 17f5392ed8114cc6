"""The sizes that a build asks for: of the bundle's own tiles, and of the profiles of plans."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tilewright.export.build.request import Request
from tilewright.export.plans.profiles import profiles
from tilewright.runtime.bundle.program import Program, TensorSpec
from tilewright.runtime.errors import UsageError


def program(name: str = "hitoksr", **sizes: tuple[int, ...]) -> Program:
    return Request(name, "tiny", Path("b"), seed=0, **sizes).program  # type: ignore[arg-type]


@pytest.mark.parametrize(("px", "overlap"), [(256, 64), (64, 32), (16, 0)])
def test_the_first_side_is_the_bundles_own_and_tiles_overlap_by_half_at_most(px: int, overlap: int) -> None:
    usual = {(p.tiles.px, p.tiles.overlap_px) for p in program().passes if p.tiles}
    asked = [p.tiles for p in program(tiles=(px, 48), batches=(2, 4, 1)).passes if p.tiles]
    assert {(t.px, t.overlap_px, t.batch) for t in asked} == {(px, min(overlap, *(o for _, o in usual)), 4)}
    assert all(max(t.whole_up_to_px or (0,)) <= px for t in asked)


def test_tiles_that_the_networks_do_not_take_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^tile=40 must be a positive multiple of \d+ for this bundle"):
        assert program(tiles=(40,))
    with pytest.raises(UsageError, match=r"^tile=512 must be one of \[\d+\] for this bundle"):
        assert program("toksr", tiles=(512,))


def test_a_network_without_an_axis_of_tiles_has_one_profile() -> None:
    component = SimpleNamespace(inputs={"x": TensorSpec("float32", (1, "words", 8))}, px={})
    assert profiles(component, (), 8, (1, 2, 4)) == [{"x": ((1, 1, 8), (1, 30, 8), (1, 1000, 8))}]  # type: ignore[arg-type]
