"""One image restored round after round: only what other inputs reach is done again, and the bytes are those of a start.

Three programs, of the kinds there are: words and image lead tiles with a state of their own (as VICR), a latent joined
every step that starts as noise (as In-Token), and one that another pass starts (as InstantIR).
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import (
    ANY,
    Call,
    Grid,
    Input,
    Pass,
    Program,
    Signature,
    State,
    Steps,
    TensorSpec,
    Tiles,
)
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk, run
from tilewright.runtime.plan.noise import normal

SEED = 7
TILES = Tiles(16, 8)
STEPS = Steps("flow_shift", 3, px_per_token=64)
CONSTANTS = {"usual_ids": np.array([[1, 0, 2, 5]])}


class Canvas(np.ndarray):
    """Planes that a job reads by crops."""

    def crop(self, top, left, height, width):
        return np.asarray(self)[:, top : top + height, left : left + width]


IMAGE = np.random.default_rng(0).random((3, 24, 24), np.float32).view(Canvas)  # two by two tiles


class Toy:
    """An engine made of a function, which may be told to fail."""

    def __init__(self, function):
        self.function, self.calls, self.fails_at = function, 0, None

    def run(self, inputs, wanted):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("device lost")
        outputs = self.function(**inputs)
        return {name: np.asarray(outputs[name], np.float32) for name in wanted}


def shares(*spec):
    return TensorSpec("float32", spec)


def per_tile(numbers):
    """Numbers [B], one for each tile, as factors of pictures."""
    return numbers[:, None, None, None]


PICTURE, NUMBER, ROWS = shares("batch", 3, "h", "w"), shares(ANY), shares("batch", "steps", 3)
IDS, WORDS, POOLED = TensorSpec("int64", ("batch", 4)), shares("batch", 4), shares("batch", 3)
FUNCTIONS = {
    "t5": lambda ids: {"context": ids / 10},
    "clip": lambda ids: {"pooled": ids[:, :3] % 5 / 4},
    "encode": lambda image: {"latent": np.roll(image, 1, 3)},
    "see": lambda image: {"seen": image.mean((2, 3))[..., None, None] * np.ones_like(image)},
    "start": lambda latent, noise: {"z": latent / 2 + noise},
    "modulate": lambda pooled, gain, sigmas: {"rows": sigmas[:, :, None] * (pooled * gain[:, None])[:, None]},
    "step": lambda z, y, seen, words, row, sigma, sigma_next: {
        "z": z + per_tile(sigma_next - sigma) * (z / 2 + y + seen * per_tile(words.mean(1)) + row[..., None, None])
    },
    "decode": lambda z, bright: {"image": np.roll(z, -1, 2) + per_tile(bright)},
}
SIGNATURES = {
    "t5": Signature({"ids": IDS}, {"context": WORDS}),
    "clip": Signature({"ids": IDS}, {"pooled": POOLED}),
    "encode": Signature({"image": PICTURE}, {"latent": PICTURE}),
    "see": Signature({"image": PICTURE}, {"seen": PICTURE}),
    "start": Signature({"latent": PICTURE, "noise": PICTURE}, {"z": PICTURE}),
    "modulate": Signature({"pooled": POOLED, "gain": NUMBER, "sigmas": shares(ANY, "steps")}, {"rows": ROWS}),
    "step": Signature(
        {"z": PICTURE, "y": PICTURE, "seen": PICTURE, "words": shares(ANY, 4), "row": shares(ANY, 3)}
        | dict.fromkeys(("sigma", "sigma_next"), NUMBER),
        {"z": PICTURE},
    ),
    "decode": Signature({"z": PICTURE, "bright": NUMBER}, {"image": PICTURE}),
}

ASKED = {
    "t5_ids": Input("int64", (1, 4), "#usual_ids"),
    "clip_ids": Input("int64", (1, 4), "#usual_ids"),
    "gain": Input("float32", default=1.0),
    "bright": Input("float32", default=0.0),
}
TEXT = Pass(
    "text",
    once=(
        Call("t5", {"ids": "$t5_ids"}, {"context": "context"}),
        Call("clip", {"ids": "$clip_ids"}, {"pooled": "pooled"}),
    ),
)
MODULATE = Pass(
    "modulate",
    TILES,
    STEPS,
    once=(Call("modulate", {"pooled": "pooled", "gain": "$gain", "sigmas": "@sigma"}, {"rows": "rows"}),),
)
SEE = Pass("see", TILES, once=(Call("see", {"image": "image"}, {"seen": "seen"}),))
ENCODE = Pass("encode", TILES, once=(Call("encode", {"image": "image"}, {"latent": "y"}),))
START = Pass("start", Tiles(16, 0), once=(Call("start", {"latent": "y", "noise": "~z"}, {"z": "z"}),))
STEP = Call(
    "step",
    {"z": "z", "y": "y", "seen": "seen", "words": "context", "row": "@rows", "sigma": "@sigma"}
    | {"sigma_next": "@sigma_next"},
    {"z": "z"},
)
SAMPLE = Pass("sample", TILES, STEPS, each=(STEP,))
PRIVATE = replace(SAMPLE, state={"z": State((3, "h/1", "w/1"), "noise")})
DECODE = Pass("decode", TILES, once=(Call("decode", {"z": "z", "bright": "$bright"}, {"image": "result"}),))
GRIDS = {"image": Grid(1, 3, "input"), "result": Grid(1, 3)}
PROGRAMS = {
    "private": Program(1, 8, GRIDS, (TEXT, ENCODE, SEE, MODULATE, PRIVATE, DECODE), ASKED),
    "joined": Program(
        1, 8, GRIDS | {"y": Grid(1, 3), "z": Grid(1, 3, "noise")}, (TEXT, MODULATE, ENCODE, SEE, SAMPLE, DECODE), ASKED
    ),
    "started": Program(
        1, 8, GRIDS | {"y": Grid(1, 3), "z": Grid(1, 3)}, (TEXT, ENCODE, START, SEE, MODULATE, SAMPLE, DECODE), ASKED
    ),
}
COUNTS = {"t5": 1, "clip": 1, "encode": 4, "see": 4, "modulate": 1, "step": 3 * 4, "decode": 4}  # of a whole run
WHOLE = {"private": COUNTS, "joined": COUNTS, "started": COUNTS | {"start": 4}}
OTHER = {"t5_ids": np.array([[4, 1, 3, 2]]), "clip_ids": np.array([[2, 8, 3, 1]])}
EMBEDS = {"context": np.float32([[0.4, 0.2, 0.1, 0.7]]), "pooled": np.float32([[0.2, 0.9, 0.5]])}


class Rounds:
    """A walk over one image, and how often each engine was called in a round."""

    def __init__(self, name, devices=1, *, closed=None, **options):
        self.program = PROGRAMS[name] if isinstance(name, str) else name
        self.engines = {name: Toy(FUNCTIONS[name]) for name in self.program.components()}
        cpus = [CpuDevice(f"cpu:{i}", self.engines) for i in range(devices)]
        if closed is not None:
            cpus[0].close = lambda names=(): closed.append((sorted(names), Counter(self.counts)))
        executor = Executor(cpus, pass_by_pass=closed is not None)
        self.result = np.empty((3, 24, 24), np.float32)
        self.walk = Walk(self.program, executor, CONSTANTS, Job(IMAGE, SEED, on_final=self.place, **options))

    def __call__(self, inputs=None, *, keep=True, fails_at=None):
        for engine in self.engines.values():
            engine.calls, engine.fails_at = 0, None
        if fails_at:
            self.engines[fails_at[0]].fails_at = fails_at[1]
        self.walk.run(inputs or {}, keep=keep)
        return self.result.tobytes()

    def place(self, top, left, part):
        self.result[:, top : top + part.shape[1], left : left + part.shape[2]] = part

    @property
    def counts(self):
        return {name: engine.calls for name, engine in self.engines.items() if engine.calls}


def fresh(program, inputs=None):
    """The bytes of a restoration that nothing came before."""
    inputs = inputs or {}
    key = repr((program, sorted((name, np.asarray(value).tolist()) for name, value in inputs.items())))
    if key not in FRESH:
        program = PROGRAMS[program] if isinstance(program, str) else program
        engines = {name: Toy(FUNCTIONS[name]) for name in program.components()}
        FRESH[key] = run(program, engines, CONSTANTS, Job(IMAGE, SEED, inputs=inputs)).tobytes()
    return FRESH[key]


FRESH = {}  # as they are always the same


def some(counts, *names):
    return {name: counts[name] for name in names if name in counts}


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_programs_here_could_run_as_bundles(program):
    specs = {name: TensorSpec(str(value.dtype), value.shape) for name, value in CONSTANTS.items()}
    check_program(PROGRAMS[program], {n: SIGNATURES[n] for n in PROGRAMS[program].components()}, specs)


# What is done again


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    ("inputs", "repeated"),
    [
        ({}, ()),
        ({"bright": 0.5}, ("decode",)),
        ({"gain": 2.0}, ("modulate", "start", "step", "decode")),
        (OTHER, ("t5", "clip", "modulate", "start", "step", "decode")),
        ({"t5_ids": OTHER["t5_ids"]}, ("t5", "clip", "modulate", "start", "step", "decode")),
        (EMBEDS, ("modulate", "start", "step", "decode")),
        ({"gain": np.float64(1.0), "bright": 0}, ("modulate", "start", "step", "decode")),  # given, though as defaulted
    ],
    ids=["nothing", "the last call's", "the table's", "all words", "some words", "embeddings", "the defaults"],
)
def test_a_round_repeats_only_the_passes_that_its_inputs_reach(program, inputs, repeated):
    rounds = Rounds(program)
    assert rounds() == fresh(program)
    assert rounds.counts == WHOLE[program]
    assert rounds(inputs) == fresh(program, inputs)
    assert rounds.counts == some(WHOLE[program], *repeated)
    assert rounds(inputs) == fresh(program, inputs)
    assert rounds.counts == {}
    rounds()
    assert rounds() == fresh(program)
    assert rounds.counts == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_equal_values_in_other_arrays_are_no_change(program):
    rounds = Rounds(program)
    rounds({"t5_ids": np.array([[4, 1, 3, 2]]), "gain": 2})
    assert rounds({"t5_ids": [[4, 1, 3, 2]], "gain": np.float32(2)}) == fresh(
        program, {"t5_ids": [[4, 1, 3, 2]], "gain": 2}
    )
    assert rounds.counts == {}


@pytest.mark.parametrize("program", PROGRAMS)
def test_an_array_that_its_owner_changed_in_place_is_a_change(program):
    rounds, inputs = Rounds(program), {name: array.copy() for name, array in (OTHER | EMBEDS).items()}
    for names in (("t5_ids", "clip_ids"), ("context", "pooled")):
        given_ones = {name: inputs[name] for name in names}
        before = rounds(given_ones)
        for array in given_ones.values():
            array += 1
        after = rounds(given_ones)
        assert after == fresh(program, given_ones) != before


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("program", PROGRAMS)
def test_rounds_on_several_workers_give_the_same_bytes(program, workers):
    rounds = Rounds(program, devices=workers)
    for inputs in ({}, OTHER, {"gain": 2.0}, EMBEDS, {}):
        assert rounds(inputs) == fresh(program, inputs)


def test_a_grid_that_is_written_anew_is_written_by_all_who_write_it():
    """What a pass starts and another goes on with is started again, or the steps would go on from where they ended."""
    rounds = Rounds("started")
    rounds()
    rounds({"gain": 2.0})
    assert (rounds.counts["start"], "encode" in rounds.counts) == (4, False)


NUDGE = Call("decode", {"z": "v", "bright": "$bright"}, {"image": "v"})
KEEP_W = Call("encode", {"image": "image"}, {"latent": "w"})
TANGLES = {
    "a pass writes anew what a third one wrote over": (
        Pass("both", TILES, once=(KEEP_W, Call("see", {"image": "image"}, {"seen": "result"}))),
        Pass("w", TILES, once=(Call("decode", {"z": "image", "bright": "$bright"}, {"image": "w"}),)),
        Pass("show", TILES, once=(Call("decode", {"z": "image", "bright": "$gain"}, {"image": "result"}),)),
    ),
    "a later pass renews a tile's value of an earlier one": (
        Pass("value", TILES, once=(Call("see", {"image": "image"}, {"seen": "v"}),)),
        Pass("renew", TILES, STEPS, each=(NUDGE,)),
        Pass("show", TILES, once=(Call("decode", {"z": "v", "bright": "$gain"}, {"image": "result"}),)),
    ),
    "a later pass writes over the grid that one read": (
        Pass("first", TILES, once=(Call("decode", {"z": "n", "bright": "$bright"}, {"image": "w"}),)),
        Pass("over", TILES, once=(Call("see", {"image": "image"}, {"seen": "n"}),)),
        Pass("show", TILES, once=(Call("start", {"latent": "w", "noise": "n"}, {"z": "result"}),)),
    ),
}


@pytest.mark.parametrize("passes", TANGLES.values(), ids=TANGLES)
def test_what_a_pass_reads_is_what_it_read_at_first_whatever_was_written_over_it_since(passes):
    program = Program(1, 8, GRIDS | {"w": Grid(1, 3), "n": Grid(1, 3, "noise")}, passes, ASKED)
    check_program(program, {n: SIGNATURES[n] for n in program.components()}, {"usual_ids": TensorSpec("int64", (1, 4))})
    rounds = Rounds(program)
    for inputs in ({}, {"bright": 0.5}, {"gain": 2.0}, {"bright": 0.25}, {}):
        assert rounds(inputs) == fresh(program, inputs)


def test_a_joined_grid_starts_from_its_noise_in_every_round():
    rounds = Rounds("joined")
    noise = normal(SEED, region=0, stream=0, channels=3, top=0, left=0, height=24, width=24)
    seen = []

    def step(**inputs):
        seen.append(inputs["z"])
        return FUNCTIONS["step"](**inputs)

    rounds.engines["step"].function = step
    for gain in (1, 2):
        seen.clear()
        rounds({"gain": gain})
        firsts = sorted(crop.tobytes() for crop in seen[:4])
        corners = [(top, left) for top in (0, 8) for left in (0, 8)]
        assert firsts == sorted(noise[:, t : t + 16, x : x + 16].tobytes() for t, x in corners)


def test_a_grid_that_nobody_writes_keeps_its_noise_through_all_rounds():
    see = replace(SEE, once=(Call("see", {"image": "n"}, {"seen": "seen"}),))
    program = PROGRAMS["private"]
    passes = tuple(see if p is SEE else p for p in program.passes)
    program = replace(program, passes=passes, grids=program.grids | {"n": Grid(1, 3, "noise")})
    rounds = Rounds(program)
    for inputs in ({}, OTHER, {"bright": 0.5}):
        assert rounds(inputs) == fresh(program, inputs)
    assert fresh(program) != fresh("private")


# Values given in the place of a pass


def test_values_given_in_the_place_of_an_untiled_pass_skip_it_in_the_first_round_too():
    rounds = Rounds("private")
    rounds(EMBEDS)
    assert rounds.counts == {name: count for name, count in COUNTS.items() if name not in ("t5", "clip")}


@pytest.mark.parametrize("program", PROGRAMS)
def test_values_that_a_pass_would_have_made_give_the_bytes_of_that_pass(program):
    made = {"context": OTHER["t5_ids"] / np.float32(10), "pooled": OTHER["clip_ids"][:, :3] % 5 / np.float32(4)}
    assert fresh(program, {name: np.float32(value) for name, value in made.items()}) == fresh(program, OTHER)


@pytest.mark.parametrize("program", PROGRAMS)
def test_after_embeddings_words_count_again_whether_given_or_defaulted(program):
    rounds = Rounds(program)
    for inputs in ({}, EMBEDS, {}, EMBEDS, OTHER, EMBEDS | {"gain": 2.0}, OTHER, {}):
        assert rounds(inputs) == fresh(program, inputs)


def test_embeddings_come_before_words_given_beside_them():
    rounds = Rounds("private")
    assert rounds(EMBEDS | OTHER) == fresh("private", EMBEDS)
    assert "t5" not in rounds.counts


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"context": EMBEDS["context"]}, "input 'context' is given without 'pooled'; give all or none"),
        ({"pooled": EMBEDS["pooled"]}, "input 'pooled' is given without 'context'; give all or none"),
        ({"pooled": EMBEDS["pooled"]} | OTHER, "input 'pooled' is given without 'context'; give all or none"),
    ],
)
def test_a_part_of_what_an_untiled_pass_makes_is_refused_before_any_work(inputs, message):
    rounds = Rounds("private")
    with pytest.raises(UsageError, match=f"^{message}$"):
        rounds(inputs)
    assert rounds.counts == {}


@pytest.mark.parametrize("name", ["seen", "rows", "z", "result", "image", "text", "t5"])
def test_what_a_tile_or_a_grid_holds_cannot_be_given(name):
    with pytest.raises(
        UsageError, match=f"^input '{name}' is not one of t5_ids, clip_ids, gain, bright, context, pooled$"
    ):
        Rounds("private")({name: np.zeros((1, 3), np.float32)})


# Rounds that fail, and rounds that keep nothing


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_round_that_is_refused_leaves_all_as_it_was(program):
    rounds = Rounds(program)
    rounds(OTHER)
    for wrong in ({"gian": 1}, {"gain": "high"}, {"t5_ids": [[1, 2]]}, {"context": EMBEDS["context"]}):
        with pytest.raises(UsageError):
            rounds(OTHER | wrong)
        assert rounds.counts == {}
        assert rounds(OTHER) == fresh(program, OTHER)
        assert rounds.counts == {}


@pytest.mark.parametrize("fails_at", [("t5", 1), ("clip", 1), ("modulate", 1), ("step", 1), ("step", 7), ("decode", 4)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_after_a_round_that_failed_what_it_finished_is_not_done_again(program, fails_at):
    rounds = Rounds(program)
    rounds()
    with pytest.raises(RuntimeError, match="device lost"):
        rounds(OTHER, fails_at=fails_at)
    assert rounds(OTHER) == fresh(program, OTHER)
    (failed,) = (p for p in PROGRAMS[program].passes if fails_at[0] in {call.run for *_, call in p.calls()})
    order = ["t5", "clip", "modulate", "start", "step", "decode"]
    first = {"text": "t5", "modulate": "modulate", "sample": "start", "decode": "decode"}[failed.name]
    repeated = order[order.index(first) :]
    if program == "started" and failed.name in ("modulate", "sample"):
        repeated = [name for name in order if name in {*repeated, "start"}]
    assert rounds.counts == some(WHOLE[program], *repeated)


@pytest.mark.parametrize("fails_at", [("t5", 1), ("modulate", 1), ("step", 7), ("decode", 4)])
@pytest.mark.parametrize("program", PROGRAMS)
def test_after_a_round_that_failed_the_inputs_from_before_give_their_bytes(program, fails_at):
    rounds = Rounds(program)
    rounds()
    with pytest.raises(RuntimeError):
        rounds(OTHER, fails_at=fails_at)
    assert rounds() == fresh(program)


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_first_round_that_failed_is_begun_where_it_ended(program):
    rounds = Rounds(program)
    with pytest.raises(RuntimeError):
        rounds(OTHER, fails_at=("decode", 4))
    assert rounds(OTHER) == fresh(program, OTHER)
    assert rounds.counts == {"decode": 4}


@pytest.mark.parametrize("program", PROGRAMS)
def test_after_a_round_that_keeps_nothing_all_is_done_again(program):
    rounds = Rounds(program)
    for inputs in ({}, {}, OTHER):
        assert rounds(inputs, keep=False) == fresh(program, inputs)
        assert rounds.counts == WHOLE[program]
    assert rounds({"bright": 0.5}) == fresh(program, {"bright": 0.5})
    assert rounds.counts == WHOLE[program]


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_round_that_keeps_nothing_still_builds_on_those_that_did(program):
    rounds = Rounds(program)
    rounds()
    assert rounds({"bright": 0.5}, keep=False) == fresh(program, {"bright": 0.5})
    assert rounds.counts == {"decode": 4}
    assert rounds({"gain": 3.0}) == fresh(program, {"gain": 3.0})


@st.composite
def sequences(draw):
    """Rounds of any inputs, kept or not, some of which fail."""
    program = draw(st.sampled_from(sorted(PROGRAMS)))
    choices = {"t5_ids": OTHER["t5_ids"], "clip_ids": OTHER["clip_ids"], "gain": 2.0, "bright": 0.5}
    rounds = []
    for _ in range(draw(st.integers(2, 5))):
        inputs = {name: choices[name] for name in sorted(choices) if draw(st.booleans())}
        fails_at = draw(st.none() | st.tuples(st.sampled_from(sorted(WHOLE[program])), st.integers(1, 10)))
        rounds.append((inputs | (EMBEDS if draw(st.booleans()) else {}), draw(st.booleans()), fails_at))
    return program, rounds


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(sequences())
def test_any_rounds_give_the_bytes_of_fresh_restorations(case):
    program, sequence = case
    rounds = Rounds(program)
    for inputs, keep, fails_at in sequence:
        try:
            found = rounds(inputs, keep=keep, fails_at=fails_at)
        except RuntimeError:
            continue
        assert found == fresh(program, inputs)


# What is told in a round


def test_a_round_tells_the_progress_of_what_it_repeats():
    told = []
    rounds = Rounds("private", on_progress=lambda *news: told.append(news))
    rounds()
    told.clear()
    rounds({"bright": 0.5})
    assert told == [("decode", done, 4) for done in range(1, 5)]


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_round_tells_its_whole_result_also_when_it_repeats_nothing(program):
    rounds = Rounds(program)
    for inputs in ({}, {}, {"bright": 0.5}, OTHER, OTHER):
        pieces = np.full((3, 24, 24), np.nan, np.float32)

        def place(top, left, part, pieces=pieces):
            pieces[:, top : top + part.shape[1], left : left + part.shape[2]] = part

        rounds.walk.job.on_final = place
        rounds(inputs)
        assert fresh(program, inputs) == pieces.tobytes()


def test_a_round_tells_which_engines_it_needs_no_more_once_their_last_pass_is_done():
    told = []
    rounds = Rounds("started", closed=told)
    rounds()
    assert [names for names, _ in told] == [
        ["clip", "t5"],
        ["encode"],
        ["start"],
        ["see"],
        ["modulate"],
        ["step"],
        ["decode"],
    ]
    for names, counts in told:
        assert all(counts[name] == WHOLE["started"][name] for name in names)
    told.clear()
    rounds({"gain": 2.0})
    assert [names for names, _ in told] == [["start"], ["modulate"], ["step"], ["decode"]]


def test_an_engine_that_a_later_pass_calls_again_is_still_needed():
    again = Pass("again", TILES, once=(Call("decode", {"z": "result", "bright": "$bright"}, {"image": "w"}),))
    last = Pass("last", TILES, once=(Call("decode", {"z": "w", "bright": "$gain"}, {"image": "result"}),))
    program = PROGRAMS["joined"]
    program = replace(program, grids=program.grids | {"w": Grid(1, 3)}, passes=(*program.passes, again, last))
    told = []
    rounds = Rounds(program, closed=told)
    rounds()
    assert [names for names, _ in told if names][-2:] == [["step"], ["decode"]]
    assert rounds.counts["decode"] == 3 * 4
