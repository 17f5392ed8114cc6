"""Statistics through PyTorch are those through the bundle's graphs, to rounding."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tilewright.calib import collect
from tilewright.calib.observe.observers import Observations
from tilewright.runtime.errors import UsageError

MOST_MOVED = 0.01  # of a tensor's numbers lie in another bin
ENDS = 1e-3  # by which the range may differ, of its width


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "ab":
        noise = np.random.default_rng(ord(name)).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"{name}.png")
    return folder


def require_alike(ours: Observations, theirs: Observations, unseen: tuple[str, ...] = ()) -> None:
    """Both saw as many numbers of each tensor at each step, and nearly the same ones, but for those `unseen`."""
    assert theirs.seen.keys() <= ours.seen.keys()
    for place, one in ours.seen.items():
        if place not in theirs.seen:
            assert place[0].startswith(unseen) and unseen, place
            continue
        other = theirs.seen[place]
        a, b = one.histogram, other.histogram
        width = b.highest - b.lowest
        assert abs(a.lowest - b.lowest) <= ENDS * width and abs(a.highest - b.highest) <= ENDS * width, place
        moved = np.abs(np.cumsum(a.counts, 1) - np.cumsum(b.counts, 1)).max()
        assert a.counts.sum() == b.counts.sum() and moved <= max(2, MOST_MOVED * b.counts.sum()), place
        assert (one.channels is None) == (other.channels is None), place
        if one.channels is not None and other.channels is not None:
            np.testing.assert_allclose(one.channels, other.channels, rtol=1e-2, atol=ENDS * width, err_msg=str(place))


@pytest.mark.slow
def test_hitoksr_is_seen_alike(hitoksr_tiny: Path, photos: Path) -> None:
    seen = [
        collect(hitoksr_tiny, photos, photos / f"{via}.safetensors", tile=128, via=via).observations
        for via in ("engines", "torch")
    ]
    require_alike(*seen)


def test_a_diffusion_system_is_seen_alike_at_every_step(in_token_tiny: Path, photos: Path) -> None:
    seen = [
        collect(in_token_tiny, photos, photos / f"{via}.safetensors", steps=2, via=via).observations
        for via in ("engines", "torch")
    ]
    require_alike(*seen, unseen=("see/image", "see/permute", "see/clamp", "see/div"))  # multiplied by a resize's table


def test_another_way_is_refused(stepping: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match="via='tea' is not one of engines, torch"):
        collect(stepping, photos, photos / "s.safetensors", via="tea")
