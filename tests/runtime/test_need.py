"""What a restoration needs: the size of its result, its tiles, its memory; more than there is is refused."""

from dataclasses import replace

import pytest

from support.scenes import noise
from tilewright.runtime import estimate as memory
from tilewright.runtime.bundle.manifest import Memory
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.estimate import estimate


def test_an_estimate_gives_the_result_size_and_the_tiles(bundle):
    plans = estimate(read_bundle(bundle), 53, 37)
    assert (plans.width, plans.height) == (106, 74)
    ((walked, plan),) = plans.passes
    assert walked.name == "restore"
    assert (plan.width, plan.height) == (112, 80)
    assert (plan.tile_width, plan.tile_height, plan.overlap) == (64, 64, 16)
    ((_, plan),) = estimate(read_bundle(bundle), 53, 37, tile=32, overlap=8).passes
    assert (plan.tile_width, plan.tile_height, plan.overlap) == (32, 32, 8)


def test_the_need_counts_weights_grids_and_the_largest_call(bundle):
    whole = read_bundle(bundle)
    need = estimate(whole, 53, 37).needed_bytes
    low = estimate(whole, 53, 37, memory="low").needed_bytes
    assert need - low == 2 * 3 * 3 * 3 * 4  # as it is stored and as float32; what is mapped can be given back
    component = whole.manifest.components["sharpen"]
    for more, added in {
        Memory(1_000_000 + 512, 24, 0): 512,
        Memory(1_000_000, 25, 0): 64 * 64,
        Memory(1_000_000, 24, 1): (64 * 64) ** 2,
    }.items():
        manifest = replace(whole.manifest, components={"sharpen": replace(component, memory=more)})
        assert estimate(replace(whole, manifest=manifest), 53, 37).needed_bytes - need == added
    result = 3 * 4 * (2 * 1000) ** 2  # a large image in the same tiles holds its result, the join and little else
    assert result < estimate(whole, 1000, 1000).needed_bytes - need < 4 * result


def with_weights(whole: Bundle, **elements: int) -> Bundle:
    """A bundle whose components have float16 weights of so many elements."""
    tensors = {name: {"w": Reference("w", "float16", (n,), 0, 2 * n)} for name, n in elements.items()}
    return replace(whole, weights=replace(whole.weights, tensors=tensors))


def test_the_need_counts_all_weights_or_those_of_the_largest_pass(tinted, monkeypatch):
    whole = with_weights(read_bundle(tinted), words=2000, paint=1000)
    none = with_weights(whole)
    both, one = (2 + 4) * 3000, (2 + 4) * 2000  # as they are stored and as float32
    bare = estimate(none, 30, 20).needed_bytes
    assert estimate(whole, 30, 20, memory="low").needed_bytes == bare
    assert estimate(whole, 30, 20).needed_bytes == bare + both
    for free, needed in ((both / 0.7 + 2, both), (both / 0.7 - 2, one), (0, one), (None, both)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        assert estimate(whole, 30, 20).needed_bytes == bare + needed


def test_the_need_counts_what_every_tile_keeps(tinted):
    whole = read_bundle(tinted)
    see = whole.manifest.components["see"]
    larger = replace(see, outputs={"mean": TensorSpec("float32", ("batch", 300, 1, 1))})
    manifest = replace(whole.manifest, components=whole.manifest.components | {"see": larger})
    for width, tiles in ((32, 1), (56, 2), (80, 3)):
        plans = [estimate(w, width, 32) for w in (whole, replace(whole, manifest=manifest))]
        assert len(plans[0].passes[1][1].tiles) == tiles
        assert plans[1].needed_bytes - plans[0].needed_bytes == 297 * 4 * tiles


def test_the_need_grows_with_the_image_and_with_the_tile(bundle):
    whole = read_bundle(bundle)
    needs = [estimate(whole, side, side).needed_bytes for side in (1, 10, 100, 1000, 10_000)]
    assert needs == sorted(set(needs))
    assert estimate(whole, 100, 1000).needed_bytes == estimate(whole, 1000, 100).needed_bytes
    tiled = [estimate(whole, 1000, 1000, tile=tile).needed_bytes for tile in (64, 512, 2048)]
    assert tiled == sorted(set(tiled))


@pytest.mark.parametrize(("width", "height"), [(0, 5), (5, 0), (-1, 5)])
def test_a_size_that_is_none_is_refused(bundle, width, height):
    with pytest.raises(UsageError, match=f"{width}x{height} is no image size"):
        estimate(read_bundle(bundle), width, height)


def test_work_that_does_not_fit_is_refused_before_it_starts(restorer, monkeypatch):
    image = noise(20, 30, 3)
    need = estimate(restorer.bundle, 30, 20).needed_bytes
    monkeypatch.setattr(memory, "available_bytes", lambda: need)
    restorer(image)
    monkeypatch.setattr(memory, "available_bytes", lambda: None)
    restorer(image)
    monkeypatch.setattr(memory, "available_bytes", lambda: need - 1)
    restorer.engines.opened.clear()  # whose memory would count as free
    restorer.executor.close()  # so that work which began would fail
    with pytest.raises(
        ResourceError, match=r"^60x40 px needs about 0\.1 GiB .* smaller --tile or --memory low$"
    ) as caught:
        restorer(image)
    assert caught.value.exit_code == 5


def test_memory_is_what_the_system_and_the_control_group_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CONTROL_GROUP", tmp_path)
    system = memory.available_bytes()
    assert 0 < system < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nactive_file 300000\ninactive_file 500000\nshmem 0\n")
    assert memory.available_bytes() > 900_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert memory.available_bytes() == 900_000  # files the group has read are dropped when memory is asked for


def test_a_larger_scale_needs_more_memory(tinted):
    needs = [estimate(read_bundle(tinted), 300, 200, scale=scale).needed_bytes for scale in (1, 2, 4)]
    assert needs == sorted(set(needs))
