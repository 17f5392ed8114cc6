"""What a restoration needs: the size of its result, its tiles, its memory; more than there is is refused."""

from dataclasses import replace

import pytest

from support.scenes import noise
from support.walks import DDPM
from tilewright.runtime.bundle.manifest import Memory
from tilewright.runtime.bundle.program import Call, State, Steps, TensorSpec
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.memory import estimate as memory
from tilewright.runtime.memory.estimate import estimate


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
    weights = 3 * 3 * 3 * 4  # as float32; what is mapped can be given back
    assert need - low == weights
    for more, added in {
        Memory(1_000_000 + 512, 0, 24): 512,
        Memory(1_000_000, 512, 24): 512,
        Memory(1_000_000, 0, 25): 64 * 64,
        Memory(1_000_000, 0, 24, 1): (64 * 64) ** 2,
    }.items():
        larger = with_memory(whole, more)
        assert estimate(larger, 53, 37).needed_bytes - need == pytest.approx(memory.ARENA * added, abs=1)
    result = 3 * (2 * 1000) ** 2  # a large image in the same tiles holds its result, its source and little else
    assert result < estimate(whole, 1000, 1000).needed_bytes - need < 4 * result


def test_an_engine_of_openvino_needs_its_code_once_and_its_networks_on_each_device(bundle):
    whole = read_bundle(bundle)
    component = whole.manifest.components["sharpen"]
    others = tuple(replace(spec, name="openvino-float32", backend="openvino") for spec in component.engines)
    components = {"sharpen": replace(component, engines=others)}
    compiled = replace(whole, manifest=replace(whole.manifest, components=components))

    def more(**options):
        return estimate(compiled, 53, 37, **options).needed_bytes - estimate(whole, 53, 37, **options).needed_bytes

    code = memory.OPENVINO_BYTES
    assert more() == code + memory.MODEL_BYTES
    assert more(devices=2, shared=True) == more(devices=2) == code + 2 * memory.MODEL_BYTES
    assert more(elsewhere=True) == 0


def with_memory(whole: Bundle, need: Memory) -> Bundle:
    """The bundle whose engine needs so much memory."""
    component = whole.manifest.components["sharpen"]
    engines = tuple(replace(spec, memory=need) for spec in component.engines)
    components = {"sharpen": replace(component, engines=engines)}
    return replace(whole, manifest=replace(whole.manifest, components=components))


def test_weights_that_are_mapped_count_apart_but_for_those_that_an_engine_copies(bundle):
    whole = with_weights(read_bundle(bundle), sharpen=2000)
    fast, low = (estimate(whole, 53, 37, memory=mode) for mode in ("fast", "low"))
    assert (fast.mapped_bytes, low.mapped_bytes) == (0, 2 * 2000)
    copying = estimate(with_memory(whole, Memory(1_000_000, 0, 24, 0, 700)), 53, 37, memory="low")
    assert copying.needed_bytes - low.needed_bytes == low.mapped_bytes - copying.mapped_bytes == 700


def test_an_engine_counts_its_graph_its_memory_and_its_weights(bundle):
    """The second engine has a table of weights of its own, in 8 bits, which it keeps as they are stored."""
    whole = with_weights(read_bundle(bundle), sharpen=1000, small=1000)
    tables = whole.weights.tensors
    tables["small"] = {"w": replace(tables["small"]["w"], dtype="int8", length=1000)}
    first = whole.manifest.components["sharpen"].engines[0]
    second = replace(first, name="ort-int8", precision="int8", weights="small", memory=Memory(900_000, 0, 24))
    needs = [estimate(whole, 53, 37, engines={"sharpen": spec}).needed_bytes for spec in (first, second)]
    assert needs[0] - needs[1] == pytest.approx(memory.ARENA * 100_000 + 4 * 1000 - 1000, abs=1)


def with_weights(whole: Bundle, **elements: int) -> Bundle:
    """A bundle whose components have float16 weights of so many elements."""
    tensors = {name: {"w": Reference("w", "float16", (n,), 0, 2 * n)} for name, n in elements.items()}
    return replace(whole, weights=replace(whole.weights, tensors=tensors))


def test_the_need_counts_all_weights_or_those_of_the_largest_pass(tinted, monkeypatch):
    whole = with_weights(read_bundle(tinted), words=2000, paint=1000)
    none = with_weights(whole)
    both, one = 4 * 3000, 4 * 2000  # as float32
    bare = estimate(none, 30, 20).needed_bytes
    assert estimate(whole, 30, 20, memory="low").needed_bytes == estimate(none, 30, 20, memory="low").needed_bytes
    assert estimate(whole, 30, 20).needed_bytes == bare + both
    for free, all_open in ((both / 0.7 + 2, True), (both / 0.7 - 2, False), (0, False), (None, True)):
        monkeypatch.setattr(memory, "available_bytes", lambda free=free: free)
        needed = estimate(whole, 30, 20).needed_bytes
        assert needed == bare + both if all_open else needed <= bare + one  # and the other engines are closed


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
    tall, wide = estimate(whole, 100, 1000).needed_bytes, estimate(whole, 1000, 100).needed_bytes
    assert tall < wide < 1.1 * tall  # tiles run row by row, so what is not final yet is longer in a wide image
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
        ResourceError, match=r"^60x40 px needs about 0\.\d\d GiB .* with --tile 32 and --memory low$"
    ) as caught:
        restorer(image)
    assert caught.value.exit_code == 5


def test_the_need_counts_states_that_are_open_and_values_that_wait(tinted):
    whole = read_bundle(tinted)
    steps = Steps("ddim", 5, 1, DDPM)
    passes = list(whole.program.passes)
    paint = passes[-1]
    state = State((4, "h/2", "w/1"))

    def need(width, *, devices=1, joined=False):
        each = (Call("paint", dict(paint.once[0].inputs), {"painted": "result" if joined else "draft"}),)
        p = replace(paint, steps=steps, state={"memory": state}, once=(), each=each, last=paint.once)
        program = replace(whole.program, passes=(*passes[:-1], p))
        return estimate(replace(whole, program=program), width, 32, devices=devices).needed_bytes

    one = 4 * 4 * 16 * 32
    assert need(3000) > need(300)
    assert need(3000, joined=True) - need(3000) > 50 * one  # every tile of a joined pass has its state
    assert need(3000, devices=2) - need(3000) >= 4 * one  # two devices have four tiles more open


def test_the_need_counts_what_joined_steps_read_to_the_end_beside_what_they_write(tinted):
    whole = read_bundle(tinted)
    *before, paint = whole.program.passes
    (call,) = paint.once
    draft = replace(paint, name="draft", once=(replace(call, outputs={"painted": "draft"}),))

    def need(source):
        each = (replace(call, inputs=call.inputs | {"image": source}),)
        joined = replace(paint, steps=Steps("ddim", 5, 1, DDPM), once=(), each=each)
        grids = whole.program.grids | {"draft": replace(whole.program.grids["result"])}
        program = replace(whole.program, grids=grids, passes=(*before, draft, joined))
        return estimate(replace(whole, program=program), 3000, 32)

    read, unread = need("draft"), need("image")
    (count,) = {plan.count for p, plan in read.passes if p.name == "draft"}
    assert read.needed_bytes - unread.needed_bytes > 0.9 * count * 4 * 3 * 32 * 32


def test_a_batch_counts_its_tiles_and_not_their_pairs(bundle):
    whole = read_bundle(bundle)
    whole = with_memory(whole, Memory(7, 3, 24, 0.5))

    def need(batch):
        p = whole.program.passes[0]
        program = replace(whole.program, passes=(replace(p, tiles=replace(p.tiles, batch=batch)),))
        return estimate(replace(whole, program=program), 900, 900).needed_bytes

    px = 64 * 64
    assert need(3) - need(1) == pytest.approx(memory.ARENA * 2 * (3 + 24 * px + 0.5 * px * px), rel=0.02)


def test_devices_that_share_engines_hold_their_weights_once(bundle):
    whole = with_weights(read_bundle(bundle), sharpen=10_000_000)
    apart, shared = (estimate(whole, 90, 60, devices=3, shared=shared).needed_bytes for shared in (False, True))
    assert apart - shared == pytest.approx(2 * 40_000_000, rel=0.01)


def test_a_larger_scale_needs_more_memory(tinted):
    needs = [estimate(read_bundle(tinted), 300, 200, scale=scale).needed_bytes for scale in (1, 2, 4)]
    assert needs == sorted(set(needs))
