"""The path of CUDA's engine, with ONNX Runtime's CPU provider and a driver of tests whose memory is the host's.

Not covered, because only a GPU does it: CUDA's kernels, its options, and recorded graphs.
"""

import threading
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from support.loops import filtered
from support.tensorrt.bindings import HERE, compiled_driver
from tilewright.export.targets.cuda import typed
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.engines import cuda, machine
from tilewright.runtime.engines.driver import Gpu, Tensor
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, UsageError


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


def test_a_graph_in_float16_takes_and_gives_float32(bundle, gpu, kernels, tmp_path):
    opened, graph = read_bundle(bundle), tmp_path / "float16.onnx"
    model = ir.load(opened.path("sharpen.onnx"))
    typed(model, "float16")
    ir.save(model, graph)
    engine = cuda.open_graph(graph, opened.files_of("sharpen"), gpu, place="cpu")
    image = noise(1, 3, 8, 8)
    sharp, right = engine.run({"image": image}, ["sharp"])["sharp"], filtered(image, kernels)
    engine.close()
    assert sharp.dtype == np.float32
    assert 0 < np.linalg.norm(sharp - right) / np.linalg.norm(right) < 2**-9  # float16 has 11 bits


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


@pytest.fixture
def numbers(monkeypatch) -> list[str]:
    """The numbers of recordings that calls ask ONNX Runtime for."""
    asked, options = list[str](), cuda.CudaEngine._options

    def noted(engine: cuda.CudaEngine, number: int) -> object:
        result = options(engine, number)
        asked.append(result.get_run_config_entry("gpu_graph_id"))
        return result

    monkeypatch.setattr(cuda.CudaEngine, "_options", noted)
    return asked


@pytest.fixture
def recording(bundle, gpu):
    opened = read_bundle(bundle)
    engine = cuda.open_graph(opened.path("sharpen.onnx"), opened.files_of("sharpen"), gpu, place="cpu")
    yield engine
    engine.close()


@pytest.mark.slow
def test_the_first_shapes_are_recorded_each_by_a_number_and_others_are_not(recording, numbers, kernels):
    sides = [8 * (1 + place) for place in range(cuda.RECORDED + 2)]
    for side in (*sides, *sides):
        image = noise(1, 3, 8, side, seed=side)
        np.testing.assert_allclose(
            recording.run({"image": image}, ["sharp"])["sharp"], filtered(image, kernels), atol=1e-6
        )
    assert numbers == 2 * [*map(str, range(1, cuda.RECORDED + 1)), "-1", "-1"]


def test_a_size_that_the_graph_refuses_does_not_end_recordings(recording, numbers):
    with pytest.raises(UsageError):
        recording.run({"image": noise(1, 4, 8, 8)}, ["sharp"])
    recording.run({"image": noise(1, 3, 8, 8)}, ["sharp"])
    assert numbers == ["1", "-1", "1"]


class Unable:
    """A session that fails whenever it should record."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self.session = session

    def io_binding(self) -> object:
        return self.session.io_binding()

    def run_with_iobinding(self, binding: object, options: onnxruntime.RunOptions) -> None:
        if options.get_run_config_entry("gpu_graph_id") != "-1":
            raise RuntimeError("operation not permitted when stream is capturing")
        self.session.run_with_iobinding(binding, options)


def test_if_recording_fails_calls_run_without_it_and_a_warning_says_so(recording, numbers, kernels, caplog):
    recording.session = Unable(recording.session)
    image = noise(1, 3, 8, 8)
    for _ in range(2):
        np.testing.assert_allclose(
            recording.run({"image": image}, ["sharp"])["sharp"], filtered(image, kernels), atol=1e-6
        )
    assert numbers == ["1", "-1", "-1"]
    assert [r.message for r in caplog.records if "not recorded" in r.message and "capturing" in r.message]


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


def test_memory_that_is_dropped_while_another_thread_has_the_gpu_is_freed_afterwards(gpu):
    tensors, used = [Tensor(gpu, (1000,), np.float32)], gpu.driver.stub_used
    before = used()
    with gpu:
        dropping = threading.Thread(target=tensors.clear, daemon=True)
        dropping.start()
        dropping.join(30)
        assert not dropping.is_alive() and used() == before
    assert used() == before - 4000
    tensors.append(Tensor(gpu, (1000,), np.float32))
    tensors.clear()
    assert used() == before - 4000


def test_dropping_memory_never_waits_for_the_gpu(gpu, monkeypatch):
    """Not even if another thread takes it between two steps: whoever holds the lock may wait for the one that drops."""

    class Watched:
        def __init__(self, lock):
            self.lock, self.release, self.waits = lock, lock.release, 0

        def acquire(self, blocking=True):
            self.waits += blocking and not self.lock._is_owned()
            return self.lock.acquire(blocking)

    tensors = [Tensor(gpu, (1000,), np.float32)]
    before = gpu.driver.stub_used()
    monkeypatch.setattr(gpu, "lock", Watched(gpu.lock))
    tensors.clear()
    assert gpu.lock.waits == 0 and gpu.driver.stub_used() == before - 4000


LIBRARY = "/usr/lib/libonnxruntime_providers_cuda.so"
TOLD = {  # what ONNX Runtime 1.31 says; the first two on a machine without a GPU, where its CUDA library was
    f"[ONNXRuntimeError] : 1 : FAIL : Failed to load library {LIBRARY} with error: libcublasLt.so.13: cannot open"
    " shared object file: No such file or directory": (EnvironmentMismatch, "CUDA's libraries are not found"),
    'Failed to parse provider option "device_id": CUDA failure 36: API call is not supported in the installed CUDA'
    " driver ; GPU=-1 ; hostname=vm ; file=a.cc ; line=70": (EnvironmentMismatch, "the GPU refuses"),
    "CUDA failure 2: out of memory ; GPU=0 ; hostname=vm ; file=a.cc ; line=70": (ResourceError, "smaller --tile"),
}


@pytest.mark.parametrize(("message", "right"), TOLD.items(), ids=["libraries", "driver", "memory"])
def test_a_failure_of_cuda_says_what_to_do(bundle, gpu, monkeypatch, message, right):
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError(message)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    opened = read_bundle(bundle)
    kind, advice = right
    with pytest.raises(kind) as caught:
        cuda.open_graph(opened.path("sharpen.onnx"), opened.files_of("sharpen"), gpu, place="cpu")
    assert advice in str(caught.value) and "\n" not in str(caught.value)
