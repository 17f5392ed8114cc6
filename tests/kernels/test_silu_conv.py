"""The native SiluConv of ONNX Runtime's CPU provider, on every instruction set, against float64."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from tilewright.export.graph.rewrites.silu_conv import FACE
from tilewright.kernels.face import plain

LIBRARY = Path(__file__).parents[2] / "kernels" / "native" / "lib" / "libtilewright_cpu.so"
pytestmark = pytest.mark.skipif(not LIBRARY.exists(), reason="native library is not built: make native")

FLAGS = {"avx512": "avx512f", "avx2": "avx2", "scalar": ""}  # what /proc/cpuinfo calls them
Arrays = dict[str, np.ndarray]
Native = Callable[[Arrays], np.ndarray]


def session(library: Path, inputs: Arrays, threads: int = 1) -> ort.InferenceSession:
    """One node whose sizes are all free."""
    free = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [f"{name}_{axis}" for axis in range(array.ndim)])
        for name, array in inputs.items()
    ]
    names = [name for name in FACE.inputs if name.rstrip("?") in inputs]
    node = helper.make_node(FACE.node_name(inputs), plain(names), ["y"], domain="tilewright")
    graph = helper.make_graph([node], "one", free, [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)])
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("tilewright", 1)]
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.register_custom_ops_library(str(library))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return ort.InferenceSession(model.SerializeToString(), options)


@pytest.fixture(scope="module", params=FLAGS)
def native(request, tmp_path_factory) -> Native:
    """Runs the op. A library chooses its instruction set once, so each has a copy of its own."""
    level, flag = request.param, FLAGS[request.param]
    if flag and flag not in Path("/proc/cpuinfo").read_text().split():
        pytest.skip(f"this CPU has no {level}")
    copy = tmp_path_factory.mktemp("native") / f"{level}.so"
    shutil.copy(LIBRARY, copy)
    sessions: dict[frozenset[str], ort.InferenceSession] = {}

    def run(inputs: Arrays) -> np.ndarray:
        given = frozenset(inputs)
        if given not in sessions:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("TILEWRIGHT_SIMD", level)
                sessions[given] = session(copy, inputs)
        return sessions[given].run(["y"], inputs)[0]

    return run


def textbook(inputs: Arrays) -> np.ndarray:
    """In float64."""
    double = {name: torch.tensor(array, dtype=torch.float64) for name, array in inputs.items()}
    z = double["x"] * double["scale"] + double["shift"]
    y = torch.conv2d(z / (1 + torch.exp(-z)), double["weight"], double.get("bias"), padding=1)
    return (y + double.get("residual", 0)).numpy()


def arrays(images: int, channels: int, outputs: int, height: int, width: int, seed: int = 0) -> Arrays:
    draw = np.random.default_rng(seed).standard_normal
    inputs = {
        "x": draw((images, channels, height, width)),
        "scale": 1 + 0.5 * draw((images, channels, 1, 1)),
        "shift": draw((images, channels, 1, 1)),
        "weight": draw((outputs, channels, 3, 3)) / np.sqrt(9 * channels),
        "bias": draw(outputs),
        "residual": draw((images, outputs, height, width)),
    }
    return {name: array.astype(np.float32) for name, array in inputs.items()}


def error(y: np.ndarray, inputs: Arrays) -> float:
    expected = textbook(inputs)
    assert y.shape == expected.shape
    return float(np.abs(y - expected).max() / np.abs(expected).max())


@st.composite
def cases(draw) -> Arrays:
    """Sizes about the edges of tiles (2 x 4 pixels), of vectors of them (4, 8, 16) and of panels (4, 8, 16 outputs)."""
    outputs, channels = draw(st.sampled_from([1, 3, 4, 8, 9, 16, 17, 33])), draw(st.sampled_from([1, 2, 5, 16, 19]))
    height, width = draw(st.integers(1, 11)), draw(st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 200])))
    inputs = arrays(draw(st.integers(1, 2)), channels, outputs, height, width, draw(st.integers(0, 99)))
    for name in draw(st.sets(st.sampled_from(["bias", "residual"]))):
        del inputs[name]
    return inputs


@given(inputs=cases())
@settings(max_examples=60, deadline=None)
def test_any_size(native: Native, inputs: Arrays) -> None:
    assert error(native(inputs), inputs) < 2e-6


@pytest.mark.parametrize(
    "sizes",
    [
        (1, 128, 32, 40, 36),  # one piece of channels
        (1, 300, 20, 24, 24),  # more than two
        (1, 171, 2, 64, 66),  # several strips of an image
        (9, 171, 2, 64, 64),  # strips enough for all threads of a small machine
    ],
)
def test_more_channels_and_tiles(native: Native, sizes: tuple[int, ...]) -> None:
    inputs = arrays(*sizes)
    assert error(native(inputs), inputs) < 2e-6


def test_silu_of_any_magnitude(native: Native) -> None:
    values = [0, -0.0, 1e-30, -1e-6, 0.1, -1, 5, -20, 30, -60, -86, 87, -88, 89, 100, -100, 1e4, -1e30, 1e30]
    x = np.repeat(np.array(values, np.float32), 35).reshape(-1, 1, 5, 7)  # an image each
    ones = np.ones((len(x), 1, 1, 1), np.float32)
    weight = np.zeros((1, 1, 3, 3), np.float32)
    weight[0, 0, 1, 1] = 1
    y = native({"x": x, "scale": ones, "shift": 0 * ones, "weight": weight})
    double = x.astype(np.float64)
    with np.errstate(over="ignore"):
        expected = double / (1 + np.exp(-double))
    np.testing.assert_allclose(y, expected, rtol=2e-6, atol=1e-37)


def test_padding_is_zero_behind_silu(native: Native) -> None:
    """Ones all over: a corner sees four pixels, an edge six."""
    one, shift = np.ones((1, 1, 1, 1), np.float32), np.full((1, 1, 1, 1), 50, np.float32)
    x, weight = np.zeros((1, 1, 5, 6), np.float32), np.ones((1, 1, 3, 3), np.float32)
    y = native({"x": x, "scale": one, "shift": shift, "weight": weight})[0, 0] / 50
    rows, columns = np.array([2, 3, 3, 3, 2]), np.array([2, 3, 3, 3, 3, 2])
    np.testing.assert_allclose(y, np.outer(rows, columns), rtol=1e-5)


@pytest.mark.parametrize("strange", [np.nan, np.inf, -np.inf])
def test_nan_stays_about_where_it_is(native: Native, strange: float) -> None:
    inputs = arrays(2, 3, 5, 13, 40)
    before = native(inputs)
    for row, column in [(0, 0), (6, 19), (7, 20), (8, 21), (12, 39)]:
        x = inputs["x"].copy()
        x[1, 2, row, column] = strange
        y = native({**inputs, "x": x})
        near = np.abs(np.arange(13) - row)[:, None], np.abs(np.arange(40) - column)
        assert not np.isfinite(y[1][:, (near[0] <= 1) & (near[1] <= 1)]).any()
        far = (near[0] > 2) | (near[1] > 4)
        np.testing.assert_array_equal(y[1][:, far], before[1][:, far])
        np.testing.assert_array_equal(y[0], before[0])


@pytest.mark.parametrize("sizes", [(1, 20, 40, 37, 41), (1, 171, 9, 64, 64), (8, 171, 2, 64, 64)])
def test_threads_change_nothing(sizes: tuple[int, ...]) -> None:
    inputs = arrays(*sizes)
    one, two, three = (session(LIBRARY, inputs, threads).run(["y"], inputs)[0] for threads in (1, 2, 3))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, three)


def test_shapes_are_inferred() -> None:
    assert session(LIBRARY, arrays(1, 1, 1, 1, 1)).get_outputs()[0].shape == ["x_0", "weight_0", "x_2", "x_3"]


def test_nothing_in_nothing_out(native: Native) -> None:
    assert native(arrays(0, 3, 4, 5, 6)).shape == (0, 4, 5, 6)
    assert native(arrays(1, 3, 4, 0, 6)).shape == (1, 4, 0, 6)


@pytest.mark.parametrize(
    ("name", "shape", "complaint"),
    [
        ("x", (2, 3, 5), r"x \[2, 3, 5\] must be \[B, C, H, W\]"),
        ("x", (2, 0, 5, 6), r"x \[2, 0, 5, 6\] must be \[B, C, H, W\]"),
        ("scale", (1, 3, 1, 1), r"scale \[1, 3, 1, 1\] must be \[2, 3, 1, 1\]"),
        ("shift", (2, 3), r"shift \[2, 3\] must be \[2, 3, 1, 1\]"),
        ("weight", (4, 2, 3, 3), r"weight \[4, 2, 3, 3\] must be \[O, 3, 3, 3\]"),
        ("weight", (4, 3, 3, 5), r"weight \[4, 3, 3, 5\] must be \[O, 3, 3, 3\]"),
        ("bias", (3,), r"bias \[3\] must be \[4\]"),
        ("residual", (2, 3, 5, 6), r"residual \[2, 3, 5, 6\] must be \[2, 4, 5, 6\]"),
    ],
)
def test_wrong_shapes_in_one_line(name: str, shape: tuple[int, ...], complaint: str) -> None:
    inputs = {**arrays(2, 3, 4, 5, 6), name: np.ones(shape, np.float32)}
    with pytest.raises(Exception, match=complaint) as refused:
        session(LIBRARY, inputs).run(["y"], inputs)
    assert len(str(refused.value).splitlines()) == 1
