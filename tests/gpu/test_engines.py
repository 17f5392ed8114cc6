"""Engines on a GPU: compiled packages and ONNX Runtime's CUDA provider give the numbers of the network in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch

from support.loops import filtered
from support.small_network import SPEC, SmallNetwork, small_weights
from tilewright.export.targets import aoti
from tilewright.export.weights.writing import write_tensors
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines import cuda
from tilewright.runtime.engines.aoti import open_package
from tilewright.runtime.engines.driver import Tensor, first_gpu

WEIGHTS = dict.fromkeys(small_weights(0), "float32")


@pytest.mark.parametrize(("precision", "most"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_a_package_runs_on_the_gpu_and_its_values_stay_there(tmp_path: Path, precision: str, most: float) -> None:
    aoti.compile_network(SPEC, WEIGHTS, precision, tmp_path)
    weights = small_weights(1)
    file = tmp_path / "weights.safetensors"
    specs = {name: TensorSpec("float32", tuple(w.shape)) for name, w in weights.items()}
    write_tensors(file, specs, (w.numpy().tobytes() for w in weights.values()), "test")
    header = safetensors_header(file).items()
    places = {n: (file, Reference(file.name, s.dtype, tuple(s.shape), at, length)) for n, (s, at, length) in header}
    package = tmp_path / f"{precision}.pt2"
    engine = open_package(package, package.with_suffix(".safetensors"), places, device="cuda")
    network = SmallNetwork().double()
    network.load_state_dict({name: w.double() for name, w in weights.items()})
    for batch, height, width in ((1, 2, 2), (3, 34, 66)):
        inputs = {"image": np.random.rand(batch, 3, height, width).astype(np.float32), "time": np.ones(1, np.float32)}
        with torch.no_grad():
            right, _ = network(**{name: torch.from_numpy(array).double() for name, array in inputs.items()})
        ours = engine.run_on(inputs, ["features"])["features"]
        assert isinstance(ours, Tensor)
        error = np.linalg.norm(ours.array() - right.numpy()) / np.linalg.norm(right.numpy())
        assert error < most
        np.testing.assert_array_equal(engine.run(inputs, ["features"])["features"], ours.array())


@pytest.mark.parametrize("graphs", [False, True], ids=["free", "recorded"])
def test_onnx_runtime_keeps_values_on_the_gpu(bundle: Path, kernels: np.ndarray, graphs: bool) -> None:
    if reason := cuda.missing():
        pytest.skip(f"ONNX Runtime's CUDA engine {reason}")
    opened = read_bundle(bundle)
    engine = cuda.open_graph(opened.path("sharpen.onnx"), opened.files_of("sharpen"), first_gpu(), graphs=graphs)
    for seed in range(4):  # the first calls are recorded
        image = np.random.default_rng(seed).random((2, 3, 8, 24), np.float32)
        once = engine.run_on({"image": image}, ["sharp"])["sharp"]
        twice = engine.run_on({"image": once}, ["sharp"])["sharp"]
        right = filtered(image, kernels)
        np.testing.assert_allclose(once.array(), right, atol=1e-5)
        np.testing.assert_allclose(twice.array(), filtered(right, kernels), atol=1e-4)
