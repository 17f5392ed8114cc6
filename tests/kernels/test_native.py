"""The native codebook ops of ONNX Runtime's CPU provider, on every instruction set, against float64."""

import os
import platform
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from tilewright.kernels.face import plain
from tilewright.kernels.table import KERNELS

LIBRARY = Path(__file__).parents[2] / "kernels" / "native" / "lib" / "libtilewright_cpu.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="native library is not built: make native")

FACES = {op.face.name: op.face for op in KERNELS.values() if op.face and op.name.startswith("codebook_")}
INPUTS = {name: plain(face.inputs) for name, face in FACES.items()}
FLAGS = {"avx512": "avx512f", "avx2": "avx2", "scalar": ""}  # what /proc/cpuinfo calls them
Arrays = dict[str, np.ndarray]


def session(library: Path, op: str, inputs: Arrays, fixed: frozenset[str] = frozenset(), threads: int = 1):
    """One node whose sizes are all free; the `fixed` inputs are initializers."""
    free = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(array.ndim)])
        for name, array in inputs.items()
        if name not in fixed
    }
    names = [name for name in INPUTS[op] if name in inputs]
    called = FACES[op].node_name(inputs)
    node = helper.make_node(called, names, ["indices", "codes"], domain="tilewright")
    outputs = [
        helper.make_tensor_value_info("indices", TensorProto.INT32, None),
        helper.make_tensor_value_info("codes", TensorProto.FLOAT, None),
    ]
    constants = [numpy_helper.from_array(inputs[name], name) for name in sorted(fixed)]
    graph = helper.make_graph([node], "one", list(free.values()), outputs, constants)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("tilewright", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


Native = Callable[..., tuple[np.ndarray, np.ndarray]]


@pytest.fixture(scope="module", params=FLAGS)
def level(request) -> str:
    flag = FLAGS[request.param]
    if flag and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def native(level, tmp_path_factory) -> Native:
    """Runs an op. A library chooses its instruction set once, so each has a copy of its own."""
    copy = tmp_path_factory.mktemp("native") / f"{level}.so"
    shutil.copy(LIBRARY, copy)
    sessions: dict[object, ort.InferenceSession] = {}

    def run(op: str, inputs: Arrays) -> tuple[np.ndarray, np.ndarray]:
        key = (op, *((name, array.ndim) for name, array in inputs.items()))
        if key not in sessions:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TILEWRIGHT_SIMD", level)
                sessions[key] = session(copy, op, inputs)
        return tuple(sessions[key].run(["indices", "codes"], inputs))

    return run


def scores_of(op: str, inputs: Arrays) -> np.ndarray:
    """[..., G, K] in float64."""
    rows, *rest, codebook = (array.astype(np.float64) for array in inputs.values())
    groups, size, width = codebook.shape
    with np.errstate(invalid="ignore"):
        if op == "CodebookNearest":
            x = rows.reshape(*rows.shape[:-1], groups, width)
            return np.einsum("...gd,gkd->...gk", x, codebook) - np.square(codebook).sum(-1) / 2
        if op == "CodebookFromHidden":
            rows = np.einsum("...c,kc->...k", rows, rest[0]) + (rest[1] if len(rest) == 2 else 0)
    return rows.reshape(*rows.shape[:-1], groups, size)


def lowest_best(scores: np.ndarray) -> np.ndarray:
    """The first of the greatest scores that are numbers; 0 where none is."""
    greatest = np.where(np.isnan(scores), -np.inf, scores).max(-1, keepdims=True)
    return (scores == greatest).argmax(-1)


def codes_at(indices: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    picked = codebook[np.arange(len(codebook)), indices]  # [..., G, D]
    return picked.reshape(*indices.shape[:-1], codebook.shape[0] * codebook.shape[2])


@st.composite
def cases(draw, numbers: Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]) -> tuple[str, Arrays]:
    """An op and inputs: sizes about the edges of tiles (8 x 48, 4 x 24, 4 x 8) and of pieces (4 and 256 channels)."""
    op = draw(st.sampled_from(sorted(INPUTS)))
    lead = draw(st.lists(st.integers(0, 5), max_size=3))
    groups, size = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 7, 8, 9, 24, 47, 48, 49, 150]))
    width, channels = draw(st.sampled_from([1, 2, 5, 8, 9])), draw(st.sampled_from([1, 3, 4, 6, 8, 256, 259]))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    last = {"CodebookNearest": groups * width, "CodebookFromLogits": groups * size, "CodebookFromHidden": channels}
    shapes = {INPUTS[op][0]: (*lead, last[op]), "weight": (groups * size, channels), "bias": (groups * size,)}
    shapes["codebook"] = (groups, size, width)
    given = [name for name in INPUTS[op] if name != "bias" or draw(st.booleans())]
    return op, {name: numbers(generator, shapes[name]).astype(np.float32) for name in given}


def grid(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Small integers: every sum is exact, and many are equal."""
    return generator.integers(-2, 3, shape)


def wild(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """The same, and about a third of the rows with something else in them."""
    numbers = grid(generator, shape).astype(np.float64)
    if numbers.size:
        rows = numbers.reshape(-1, shape[-1])
        hit = generator.random(len(rows)) < 0.3
        at = generator.integers(0, shape[-1], len(rows))
        rows[hit, at[hit]] = generator.choice([np.nan, np.inf, -np.inf], hit.sum())
    return numbers


def normal(generator: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return generator.normal(size=shape)


def assert_exact(native: Native, op: str, inputs: Arrays) -> None:
    indices, codes = native(op, inputs)
    np.testing.assert_array_equal(indices, lowest_best(scores_of(op, inputs)))
    np.testing.assert_array_equal(codes, codes_at(indices, inputs["codebook"]))
    assert indices.dtype == np.int32 and codes.dtype == np.float32


def assert_best(native: Native, op: str, inputs: Arrays) -> None:
    """A sum of n products is off by at most n + 1 roundings of the sum of their sizes."""
    indices, codes = native(op, inputs)
    scores = scores_of(op, inputs)
    chosen = np.take_along_axis(scores, indices[..., None].astype(np.int64), -1)[..., 0]
    sizes = scores_of(op, {name: np.abs(array) for name, array in inputs.items()})
    if op == "CodebookNearest":
        sizes = sizes + np.square(inputs["codebook"].astype(np.float64)).sum(-1)  # both terms, not their difference
    terms = {"CodebookNearest": 2 * inputs["codebook"].shape[-1], "CodebookFromLogits": 0}
    rounding = (
        (terms.get(op, inputs[INPUTS[op][0]].shape[-1]) + 1) * np.finfo(np.float32).eps * sizes.max(-1, initial=0)
    )
    assert (scores.max(-1) - chosen <= 2 * rounding).all()
    np.testing.assert_array_equal(codes, codes_at(indices, inputs["codebook"]))


@settings(deadline=None, max_examples=80)
@given(case=cases(grid))
def test_the_lowest_of_the_best_is_chosen_where_sums_are_exact(native, case):
    assert_exact(native, *case)


@settings(deadline=None, max_examples=80)
@given(case=cases(wild))
def test_nan_never_wins_and_infinities_are_compared(native, case):
    assert_exact(native, *case)


@settings(deadline=None, max_examples=40)
@given(case=cases(normal))
def test_no_codeword_scores_above_the_chosen_one(native, case):
    assert_best(native, *case)


@cache
def full_size(op: str, rows: int) -> Arrays:
    """HiTokSR's codebooks and head."""
    generator = np.random.default_rng(7)
    first = {"CodebookNearest": 32, "CodebookFromLogits": 16_384, "CodebookFromHidden": 768}[op]
    shapes = {INPUTS[op][0]: (rows, first), "weight": (16_384, 768), "bias": (16_384,), "codebook": (4, 4096, 8)}
    return {name: generator.standard_normal(shapes[name], np.float32) for name in INPUTS[op]}


@pytest.mark.slow
@pytest.mark.parametrize("op", INPUTS)
def test_the_full_size_is_chosen_from_too(native, op):
    assert_best(native, op, full_size(op, 21))


@pytest.mark.parametrize("op", INPUTS)
@pytest.mark.parametrize("rest", [[], [-np.inf], [-np.inf, -np.inf]], ids=["alone", "before one", "before two"])
def test_only_where_all_are_nan_is_it_the_first(native, op, rest):
    scores = np.array([np.nan, *rest], np.float32)
    ones = np.ones((1, len(scores), 1), np.float32)
    if op == "CodebookNearest":  # -|c|^2 / 2 is minus infinity for a codeword of infinity, which zeros make NaN
        inputs = {"latents": np.ones((1, 1), np.float32), "codebook": np.where(np.isnan(scores), scores, -np.inf)}
        inputs["codebook"] = inputs["codebook"].reshape(1, -1, 1)
    elif op == "CodebookFromLogits":
        inputs = {"logits": scores[None], "codebook": ones}
    else:
        inputs = {"hidden": np.ones((1, 1), np.float32), "weight": scores[:, None], "codebook": ones}
    assert native(op, inputs)[0].tolist() == [[1 if rest else 0]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere every CPU multiplies and adds at once")
def test_the_instruction_set_that_is_asked_for_is_the_one_in_use(native, level):
    x = np.float32(1 + 2**-12)  # its square is rounded down: where that is done before the sum, nothing remains
    inputs = {"hidden": [[x * x, x]], "weight": [[0, 0], [-1, x]], "codebook": [[[0], [1]]]}
    indices, _ = native("CodebookFromHidden", {name: np.array(given, np.float32) for name, given in inputs.items()})
    assert indices.tolist() == [[0 if level == "scalar" else 1]]


@pytest.mark.slow
@pytest.mark.parametrize("op", INPUTS)
def test_neither_threads_nor_other_rows_change_a_choice(op):
    inputs = full_size(op, 1100)  # more than a block
    first = INPUTS[op][0]
    indices, codes = session(LIBRARY, op, inputs).run(None, inputs)
    for threads, rows in [(2, slice(0, 1100)), (3, slice(0, 1100)), (1, slice(1015, 1033)), (2, slice(1099, 1100))]:
        part = inputs | {first: inputs[first][rows]}
        found = session(LIBRARY, op, inputs, threads=threads).run(None, part)
        np.testing.assert_array_equal(found[0], indices[rows])
        np.testing.assert_array_equal(found[1], codes[rows])


@pytest.mark.parametrize("op", INPUTS)
def test_weights_may_be_initializers(op):
    inputs = full_size(op, 21)
    first, *fixed = inputs
    found = session(LIBRARY, op, inputs, frozenset(fixed)).run(None, {first: inputs[first]})
    np.testing.assert_array_equal(found[0], session(LIBRARY, op, inputs).run(None, inputs)[0])


def test_shapes_are_known_before_the_run_as_far_as_they_can_be():
    inputs = {"latents": np.zeros((1, 1, 6), np.float32), "codebook": np.zeros((2, 4, 3), np.float32)}
    outputs = session(LIBRARY, "CodebookNearest", inputs, frozenset(["codebook"])).get_outputs()
    assert [output.shape for output in outputs] == [["latents_0", "latents_1", 2], ["latents_0", "latents_1", 6]]


REFUSALS = [
    ("CodebookNearest", {"latents": (5, 7), "codebook": (2, 4, 3)}, r"latents \[5, 7\] .* codebook \[2, 4, 3\]"),
    ("CodebookNearest", {"latents": (), "codebook": (2, 4, 3)}, r"latents \[\] .* codebook \[2, 4, 3\]"),
    ("CodebookNearest", {"latents": (5, 6), "codebook": (2, 3)}, r"codebook \[2, 3\] must be \[G, K, D\]"),
    ("CodebookNearest", {"latents": (5, 6), "codebook": (2, 0, 3)}, r"codebook \[2, 0, 3\] must have 1 to"),
    ("CodebookFromLogits", {"logits": (5, 6), "codebook": (2, 4, 3)}, r"logits \[5, 6\] .* codebook \[2, 4, 3\]"),
    (
        "CodebookFromHidden",
        {"hidden": (5, 6), "weight": (8, 7), "codebook": (2, 4, 3)},
        r"hidden \[5, 6\] .* weight \[8, 7\]",
    ),
    (
        "CodebookFromHidden",
        {"hidden": (5, 6), "weight": (9, 6), "codebook": (2, 4, 3)},
        r"weight \[9, 6\] .* codebook \[2, 4, 3\]",
    ),
    (
        "CodebookFromHidden",
        {"hidden": (5, 6), "weight": (8, 6), "bias": (1, 8), "codebook": (2, 4, 3)},
        r"bias \[1, 8\] .* codebook \[2, 4, 3\]",
    ),
]


@pytest.mark.parametrize(("op", "shapes", "said"), REFUSALS)
def test_wrong_shapes_are_refused_in_one_line(op, shapes, said):
    inputs = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    with pytest.raises(ort.capi.onnxruntime_pybind11_state.InvalidArgument, match=rf"{op}\w* node.*{said}") as refused:
        session(LIBRARY, op, inputs).run(None, inputs)
    assert "\n" not in str(refused.value)


def test_an_instruction_set_that_is_not_here_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_SIMD", "avx1024")
    copy = shutil.copy(LIBRARY, tmp_path)
    with pytest.raises(Exception, match=r"TILEWRIGHT_SIMD=avx1024: this CPU has .*scalar"):
        ort.SessionOptions().register_custom_ops_library(os.fspath(copy))
