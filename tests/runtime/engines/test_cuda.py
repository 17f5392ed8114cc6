"""The path of CUDA's engine, with ONNX Runtime's CPU provider and a driver of tests whose memory is the host's.

Not covered, because only a GPU does it: CUDA's kernels, its options, and recorded graphs.
"""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from support.loops import filtered
from support.tensorrt.bindings import HERE, compiled_driver
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines import cuda, machine
from tilewright.runtime.engines.driver import Gpu, Tensor
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.fixture
def gpu(shared, monkeypatch) -> Gpu:
    monkeypatch.setattr(machine, "CUDA", str(compiled_driver(HERE / "driver.c", shared)))
    return Gpu()


@pytest.fixture(params=[False, True], ids=["free", "fixed addresses"])
def engine(bundle, gpu, request):
    opened = read_bundle(bundle)
    files = opened.files_of("sharpen")
    engine = cuda.open_graph(opened.path("sharpen.onnx"), files, gpu, place="cpu", graphs=request.param)
    yield engine
    engine.close()


def test_values_stay_where_they_are_and_are_those_of_a_convolution_in_loops(engine, gpu, kernels):
    for seed, shape in enumerate([(1, 3, 8, 8), (2, 3, 8, 24), (1, 3, 8, 8), (1, 3, 8, 8)]):
        image = noise(*shape, seed=seed)
        on_gpu = Tensor(gpu, shape, np.float32)
        gpu.fill(on_gpu.address, image)
        gpu.wait()
        first = engine.run_on({"image": on_gpu}, ["sharp"])["sharp"]
        assert isinstance(first, Tensor) and first.shape == shape
        twice = engine.run_on({"image": first}, ["sharp"])["sharp"]
        once = filtered(image, kernels)
        np.testing.assert_allclose(first.array(), once, atol=1e-6)
        np.testing.assert_allclose(twice.array(), filtered(once, kernels), atol=1e-5)
        np.testing.assert_array_equal(engine.run({"image": image}, ["sharp"])["sharp"], first.array())


def test_outputs_belong_to_the_caller(engine):
    one, other = noise(1, 3, 8, 8, seed=1), noise(1, 3, 8, 8, seed=2)
    first = engine.run_on({"image": one}, ["sharp"])["sharp"]
    before = first.array()
    assert not np.allclose(engine.run_on({"image": other}, ["sharp"])["sharp"].array(), before)
    np.testing.assert_array_equal(first.array(), before)


@pytest.mark.parametrize(
    ("inputs", "outputs", "kind", "said"),
    [
        ({}, ["sharp"], BundleError, "input 'image' is missing or unknown"),
        ({"image": noise(1, 3, 8, 8), "mask": noise(1)}, ["sharp"], BundleError, "input 'mask' is missing or unknown"),
        ({"image": noise(1, 3, 8, 8)}, ["dull"], BundleError, "has no output 'dull'"),
        ({"image": noise(1, 3, 8, 8).astype(np.float64)}, ["sharp"], BundleError, "is not of type float32"),
        ({"image": noise(1, 4, 8, 8)}, ["sharp"], UsageError, "the graph does not take this size"),
    ],
)
def test_what_the_graph_does_not_take_is_refused_in_one_line(engine, inputs, outputs, kind, said):
    with pytest.raises(kind) as caught:
        engine.run(inputs, outputs)
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_the_options_are_texts_and_put_the_work_into_our_stream():
    options = cuda.provider_options(4242, graphs=True)
    assert all(isinstance(value, str) for value in options.values())
    assert options["user_compute_stream"] == "4242" and options["enable_cuda_graph"] == "1"


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this ONNX Runtime has CUDA's provider"
)
def test_without_the_provider_one_line_says_what_to_install(bundle, gpu):
    assert "pip install onnxruntime-gpu" in (cuda.missing() or "")
    opened = read_bundle(bundle)
    with pytest.raises(EnvironmentMismatch) as caught:
        cuda.open_graph(Path(opened.path("sharpen.onnx")), opened.files_of("sharpen"), gpu)
    assert "this ONNX Runtime has no CUDA" in str(caught.value) and caught.value.exit_code == 4
