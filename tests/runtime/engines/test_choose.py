"""Choosing an engine: the best that fits is taken, and every other one has a reason."""

import operator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.version import Version

from tilewright.runtime.bundle.manifest import PRECISIONS, Component, EngineSpec, Needs, Profile, Range
from tilewright.runtime.bundle.measured import Measured
from tilewright.runtime.engines.choose import Machine, choose, choose_all, largest_batch, require
from tilewright.runtime.errors import EnvironmentMismatch, UsageError

KNOWN = ("ort", "openvino", "cuda")
SETS = ("avx2", "avx512_vnni", "amx_bf16")

versions = st.lists(st.integers(0, 3), min_size=1, max_size=4).map(lambda parts: ".".join(map(str, parts)))
capabilities = st.tuples(st.integers(7, 9), st.integers(0, 1))
needs = st.builds(
    Needs,
    instructions=st.sets(st.sampled_from(SETS)).map(tuple),
    compute_capability=st.none() | capabilities,
    packages=st.dictionaries(st.sampled_from(["onnxruntime", "openvino"]), versions),
    cores=st.sampled_from([1, 2]),
    exactly=st.booleans(),
)
measured = st.builds(
    Measured,
    relative_l2=st.just(1e-6),
    seconds_per_megapixel=st.sampled_from([1.0, 2.0, 3.0]),
    psnr_db=st.sampled_from([None, 30.0, 40.0, 50.0]),
)
names = st.from_regex("[a-d]-[0-9]", fullmatch=True)
measured_engines = st.dictionaries(names, measured)
specs_of_a_component = st.lists(
    st.builds(
        EngineSpec,
        name=names,
        backend=st.sampled_from((*KNOWN, "abacus")),
        device=st.sampled_from(["cpu", "cuda"]),
        precision=st.sampled_from(PRECISIONS),
        files=st.just(("model.onnx",)),
        needs=st.just(Needs()) | needs,
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda spec: spec.name,
)
machines = st.builds(
    Machine,
    cores=st.sampled_from([1, 2]),
    devices=st.sampled_from([("cpu",), ("cpu", "cuda")]),
    instructions=st.sets(st.sampled_from(SETS)).map(tuple),
    compute_capability=st.none() | capabilities,
    backends=st.sets(st.sampled_from(KNOWN)).map(tuple),
    packages=st.dictionaries(st.sampled_from(["onnxruntime", "openvino"]), versions),
)


def fits(spec: EngineSpec, machine: Machine) -> bool:
    """Whether a machine has everything that an engine needs."""
    needs, has = spec.needs, machine.packages
    as_asked = operator.eq if needs.exactly else operator.ge
    return (
        spec.device in machine.devices
        and spec.backend in machine.backends
        and set(needs.instructions) <= set(machine.instructions)
        and (not needs.compute_capability or as_asked(machine.compute_capability or (0, 0), needs.compute_capability))
        and needs.cores <= machine.cores
        and all(name in has and as_asked(Version(has[name]), Version(least)) for name, least in needs.packages.items())
    )


def accurate(spec: EngineSpec, known: dict[str, Measured]) -> bool:
    """Whether an engine computes in float32, or restores a picture that is close to float32's."""
    return spec.precision == "float32" or (spec.name in known and (known[spec.name].psnr_db or 0) >= 40)


@pytest.mark.slow
@given(specs_of_a_component, machines)
def test_the_chosen_engine_fits_and_every_other_one_has_a_reason(specs, machine):
    choice = choose(specs, machine)
    fitting = {spec.name for spec in specs if fits(spec, machine)}
    assert choice.misfits.keys() == {spec.name for spec in specs} - fitting
    assert (choice.spec is None) == (not fitting)
    assert choice.others.keys() == fitting - ({choice.spec.name} if choice.spec else set())
    for reason in (*choice.misfits.values(), *choice.others.values()):
        assert reason and reason.isprintable()


@pytest.mark.slow
@given(specs_of_a_component, machines, measured_engines)
def test_no_engine_that_fits_is_more_accurate_or_measured_to_be_faster(specs, machine, known):
    best = choose(specs, machine, measured=known).spec
    for spec in (spec for spec in specs if fits(spec, machine)):
        if accurate(spec, known):
            assert accurate(best, known)
        if spec.name in known and accurate(spec, known) == accurate(best, known):
            assert known[best.name].seconds_per_megapixel <= known[spec.name].seconds_per_megapixel


@pytest.mark.slow
@given(specs_of_a_component, machines, st.randoms())
def test_the_order_of_the_engines_does_not_matter(specs, machine, random):
    shuffled = random.sample(specs, len(specs))
    assert choose(shuffled, machine) == choose(specs, machine)


@pytest.mark.slow
@given(specs_of_a_component, machines, st.data())
def test_a_wish_restricts_the_choice_to_what_it_names(specs, machine, data):
    one = data.draw(st.sampled_from(specs))
    wish = data.draw(st.sampled_from([one.name, one.precision, one.backend]))
    left = [spec for spec in specs if wish in (spec.name, spec.precision, spec.backend)]
    choice = choose(specs, machine, wish)
    assert choice.spec == choose(left, machine).spec
    reasons = choice.misfits | choice.others
    assert reasons.keys() == {spec.name for spec in specs} - ({choice.spec.name} if choice.spec else set())


@pytest.mark.slow
@given(specs_of_a_component, machines)
def test_a_machine_without_the_chosen_engine_is_given_the_next(specs, machine):
    order = []
    while specs and (best := choose(specs, machine).spec):
        order.append(best)
        specs = [spec for spec in specs if spec is not best]
    assert not any(fits(spec, machine) for spec in specs)
    assert [spec.precision == "float32" for spec in order] == sorted(s.precision == "float32" for s in order)[::-1]


@pytest.mark.slow
@given(specs_of_a_component, machines, st.data())
def test_machine_code_of_strangers_is_left_out_unless_it_is_asked_for(specs, machine, data):
    strange = data.draw(st.sets(st.sampled_from([spec.name for spec in specs])))
    usual, left = choose(specs, machine, strange=strange), [spec for spec in specs if spec.name not in strange]
    assert usual.spec == (choose(left, machine).spec if left else None)
    assert strange <= usual.misfits.keys()
    one = data.draw(st.sampled_from(specs))
    if fits(one, machine):
        assert choose(specs, machine, one.name, strange=strange).spec == one


SPEC = EngineSpec("ort-float32", "ort", "cpu", "float32", ("model.onnx",))
MACHINE = Machine(
    cores=2,
    instructions=("avx2",),
    backends=("ort",),
    missing={"openvino": "needs OpenVINO: pip install openvino"},
    packages={"onnxruntime": "1.21.2"},
)
GPU = replace(MACHINE, devices=("cpu", "cuda"), compute_capability=(8, 6))


@pytest.mark.parametrize(
    ("changes", "machine", "reason"),
    [
        ({"device": "cuda"}, MACHINE, "runs on cuda, and here is cpu only"),
        ({"backend": "openvino"}, MACHINE, "needs OpenVINO: pip install openvino"),
        ({"backend": "abacus"}, MACHINE, "has a backend that is not known here, 'abacus'"),
        ({"needs": Needs(("avx2", "amx_int8"))}, MACHINE, "needs amx_int8, which this CPU lacks"),
        ({"needs": Needs(cores=4)}, MACHINE, "needs 4 cores, and this process may use 2"),
        ({"needs": Needs((), (9, 0))}, GPU, "needs compute capability 9.0, this GPU's is 8.6"),
        ({"needs": Needs((), (9, 0))}, MACHINE, "needs compute capability 9.0, this GPU's is unknown"),
        (
            {"needs": Needs(packages={"onnxruntime": "1.22"})},
            MACHINE,
            "needs onnxruntime 1.22 or later, 1.21.2 is installed: pip install 'onnxruntime>=1.22'",
        ),
        (
            {"needs": Needs(packages={"openvino": "2026.4"})},
            MACHINE,
            "needs openvino 2026.4 or later, it is not installed: pip install 'openvino>=2026.4'",
        ),
        (
            {"needs": Needs((), (8, 0), exactly=True)},
            GPU,
            "needs compute capability 8.0, this GPU's is 8.6",
        ),
        (
            {"needs": Needs(packages={"onnxruntime": "1.21"}, exactly=True)},
            MACHINE,
            "was compiled with onnxruntime 1.21, and 1.21.2 is installed:"
            " compile it again, or pip install 'onnxruntime==1.21'",
        ),
    ],
)
def test_a_misfit_says_what_is_needed_and_what_is_here(changes, machine, reason):
    choice = choose([replace(SPEC, **changes)], machine)
    assert choice.spec is None
    assert choice.misfits == {"ort-float32": reason}


@pytest.mark.parametrize(
    ("other", "seconds", "reason"),
    [
        ({"precision": "int8"}, {}, "best is more accurate (not measured); --engine other asks for this one"),
        (
            {"precision": "int8"},
            {"other": 0.1},
            "best is more accurate (39.9 dB, the gate is 40 dB); --engine other asks for this one",
        ),
        ({}, {"best": 1.25, "other": 3}, "best is faster: 1.25 s a megapixel, this one 3"),
        ({}, {"best": 1.25}, "best was measured, this one was not"),
        ({}, {}, "best comes first in the fixed order"),
    ],
)
def test_an_engine_that_would_run_says_why_another_was_chosen(other, seconds, reason):
    specs = [replace(SPEC, name="other", **other), replace(SPEC, name="best")]
    choice = choose(specs, MACHINE, measured={name: Measured(0, value, 39.9) for name, value in seconds.items()})
    assert choice.spec.name == "best"
    assert choice.others == {"other": reason}


def components(**engines: tuple[EngineSpec, ...]) -> dict[str, Component]:
    return {name: Component("a.onnx", {}, {}, specs) for name, specs in engines.items()}


def test_a_wish_holds_for_the_components_that_can_fulfil_it():
    whole = components(step=(SPEC, replace(SPEC, name="ort-int8", precision="int8")), decode=(SPEC,))
    specs = require(choose_all(whole, MACHINE, "int8"))
    assert {name: spec.name for name, spec in specs.items()} == {"step": "ort-int8", "decode": "ort-float32"}


def test_a_wish_that_no_engine_fulfils_lists_them_all():
    whole = components(step=(SPEC, replace(SPEC, name="vino-int8", precision="int8", backend="openvino")))
    with pytest.raises(UsageError) as caught:
        choose_all(whole, MACHINE, "float16")
    assert str(caught.value) == (
        "engine='float16' is none of this bundle's engines: ort-float32, vino-int8; their precisions: float32, int8;"
        " their backends: openvino, ort"
    )


def test_components_that_no_engine_can_run_are_refused_with_all_reasons_in_one_line():
    cuda = replace(SPEC, name="cuda-float32", device="cuda")
    vino = replace(SPEC, name="vino-float32", backend="openvino")
    with pytest.raises(EnvironmentMismatch) as caught:
        require(choose_all(components(step=(cuda, vino), words=(SPEC,), decode=(vino,)), MACHINE))
    assert str(caught.value) == (
        "no engine of decode, step can run here: cuda-float32 runs on cuda, and here is cpu only;"
        " vino-float32 needs OpenVINO: pip install openvino"
    )
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(("side", "chosen"), [(None, "a"), (256, "a"), (512, "a"), (255, "b"), (513, "b")])
def test_an_engine_that_was_made_for_other_tiles_is_refused(side, chosen):
    fixed = replace(SPEC, name="a", profile=Profile(Range(1, 4), Range(256, 512)))
    choice = choose([fixed, replace(SPEC, name="b")], MACHINE, side_px=side)
    assert choice.spec.name == chosen
    if chosen == "b":
        assert choice.misfits == {"a": f"takes tiles of 256 to 512 px, and these have {side}"}


def test_the_largest_batch_is_that_of_the_engine_that_takes_the_fewest_tiles():
    assert largest_batch([replace(SPEC, profile=Profile(Range(1, n))) for n in (8, 3, 32)]) == 3


def test_an_engine_in_bfloat16_with_a_close_picture_is_chosen_if_it_is_faster():
    brain = replace(SPEC, name="brain", precision="bfloat16")
    for psnr, seconds, chosen in ((40.0, 1.0, "brain"), (40.0, 3.0, SPEC.name), (39.0, 1.0, SPEC.name)):
        known = {SPEC.name: Measured(1e-6, 2.0, 140.0), "brain": Measured(1e-2, seconds, psnr)}
        assert choose([SPEC, brain], MACHINE, measured=known).spec.name == chosen
