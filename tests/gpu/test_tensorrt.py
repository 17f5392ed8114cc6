"""TensorRT itself on a GPU: the driver's wrapper, and a bundle that is compiled and restores as on the CPU."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from support.bundles import MANIFEST, staged, weights_dir  # noqa: F401
from tilewright.export.build.compile import compile_engines
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.engines import machine
from tilewright.runtime.engines.driver import Tensor, first_gpu
from tilewright.runtime.restore import load


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    """Skips without a GPU; PyTorch need not have CUDA."""
    if machine.compute_capability() is None:
        pytest.skip("no NVIDIA GPU")
    yield


def test_arrays_go_to_the_gpu_and_back() -> None:
    gpu = first_gpu()
    array = np.random.default_rng(0).random((3, 1000), np.float32)
    tensor, copy = Tensor(gpu, array.shape, array.dtype), Tensor(gpu, array.shape, array.dtype)
    gpu.fill(tensor.address, array)
    recording = gpu.record(lambda: gpu.copy(copy.address, tensor.address, tensor.nbytes))
    recording.run()
    np.testing.assert_array_equal(copy.array(), array)
    recording.free()
    assert 0 < gpu.memory()[0] <= gpu.memory()[1]


@pytest.mark.parametrize(("precision", "levels"), [("float32", 1), ("bfloat16", 6)])
def test_a_picture_is_restored_as_on_the_cpu(precision: str, levels: int, tmp_path: Path, staged) -> None:  # noqa: F811
    pytest.importorskip("tensorrt", reason="TensorRT is not installed")
    staging, _ = staged()
    component = replace(MANIFEST.components["sharpen"], px={"height": 1, "width": 1})
    seal(staging, replace(MANIFEST, components={"sharpen": component}), tmp_path / "b")
    compile_engines(tmp_path / "b", ["tensorrt"], [precision])
    pixels = np.random.default_rng(1).integers(0, 256, (70, 90, 3), np.uint8)
    on_gpu, on_cpu = (load(tmp_path / "b", devices=[d]).restore(pixels).image for d in ("cuda:0", "cpu:0"))
    assert np.abs(on_gpu.astype(int) - on_cpu.astype(int)).max() <= levels
