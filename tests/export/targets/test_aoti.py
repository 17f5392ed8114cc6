"""Packages of AOTInductor give the numbers of the network, and a line that says why when they cannot run."""

import json
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from support.small_network import SPEC, TYPES, SmallNetwork, compile_small, feed, small_weights, stored
from tilewright.export.targets import aoti
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.engines.aoti import AotiEngine, open_package
from tilewright.runtime.errors import BuildError, BundleError, UsageError

if shutil.which("g++") is None:
    pytest.skip("needs g++", allow_module_level=True)
pytestmark = pytest.mark.slow  # PyTorch and a compiler take 10 s for a package


@pytest.fixture(scope="module")
def package(shared) -> Path:
    """The network's package in float32."""
    return shared("aoti-small", compile_small) / "float32.pt2"


def opened(package: Path, places: dict, **options) -> AotiEngine:
    return open_package(package, package.with_suffix(".safetensors"), places, **{"threads": 1} | options)


def expected(weights: dict, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """The network in float64, by its own code."""
    network = SmallNetwork().double()
    network.load_state_dict(weights)
    with torch.no_grad():
        features, indices = network(**{name: torch.from_numpy(array).double() for name, array in inputs.items()})
    return features.numpy(), indices.numpy()


@pytest.mark.parametrize("seed", [1, 2])
def test_one_package_serves_any_weights_and_any_sizes(package, tmp_path, seed):
    places, weights = stored(tmp_path, seed)
    engine = opened(package, places)
    for sizes in ((1, 2, 2, 1), (2, 6, 10, 2), (3, 8, 4, 1), (1, 34, 66, 1), (31, 2, 4, 31)):
        inputs = feed(*sizes)
        ours = engine.run(inputs, ["indices", "features"])
        features, indices = expected(weights, inputs)
        assert list(ours) == ["indices", "features"]
        assert ours["features"].dtype == np.float32 and ours["indices"].dtype == np.int32
        np.testing.assert_allclose(ours["features"], features, atol=2e-6)
        np.testing.assert_array_equal(ours["indices"], indices)
    engine.close()


def test_in_bfloat16_products_are_short_and_angles_and_choices_are_not(tmp_path):
    aoti.compile_network(SPEC, TYPES, "bfloat16", tmp_path)
    places, weights = stored(tmp_path, 1)
    engine = opened(tmp_path / "bfloat16.pt2", places)
    inputs = feed(2, 12, 8, 1)
    ours = engine.run(inputs, ["features", "indices"])
    features, _ = expected(weights, inputs)
    assert ours["features"].dtype == np.float32 and ours["indices"].dtype == np.int32
    error = np.linalg.norm(ours["features"] - features) / np.linalg.norm(features)
    assert 1e-4 < error < 1e-2
    rows = ours["features"].transpose(0, 2, 3, 1).reshape(-1, 2, 1, 4)
    apart = ((rows.astype(np.float64) - weights["codebook"].numpy()) ** 2).sum(-1)
    chosen = np.take_along_axis(apart, ours["indices"].reshape(-1, 2, 1), 2)[..., 0]
    assert (chosen - apart.min(-1)).max() < 1e-5


def test_weights_lie_in_their_own_file_and_what_the_network_computes_lies_beside(package):
    with zipfile.ZipFile(package) as archive:
        code = b"".join(archive.read(name) for name in archive.namelist())
    assert not any(w.float().numpy().tobytes()[:64] in code for w in small_weights(0).values())
    assert b"tilewright::" not in code  # our ops are inside, not called
    assert [*safetensors_header(package.with_suffix(".safetensors"))] == ["frequencies"]


def test_weights_are_mapped_not_copied(package, tmp_path):
    places, _ = stored(tmp_path, 1)
    engine = opened(package, places)
    inputs = feed(1, 4, 4, 1)
    before = engine.run(inputs, ["features"])["features"]
    file, reference = places["look.bias"]
    with file.open("r+b") as data:
        data.seek(reference.offset)
        data.write(np.full(8, 7, np.float32).tobytes())
    after = engine.run(inputs, ["features"])["features"]
    assert not np.allclose(before, after)


def test_calls_at_the_same_time_give_the_numbers_of_calls_one_by_one(package, tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    engine = opened(package, stored(tmp_path, 1)[0], calls=2)
    feeds = [feed(2, 16, 16 + 2 * i, 2, seed=i) for i in range(8)]
    one_by_one = [engine.run(inputs, ["features"])["features"] for inputs in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda inputs: engine.run(inputs, ["features"])["features"], feeds))
    for one, other in zip(one_by_one, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_it_runs_without_the_code_of_the_network(package, tmp_path):
    places, weights = stored(tmp_path, 1)
    inputs = feed(2, 6, 8, 1)
    np.savez(tmp_path / "in.npz", **inputs)
    text = {n: [str(file), r.file, r.dtype, list(r.shape), r.offset, r.length] for n, (file, r) in places.items()}
    code = f"""
import sys, json
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("tilewright.export", "tilewright.kernels", "support", "torch._inductor", "diffusers")):
            raise ImportError(name + " is not to be imported")
sys.meta_path.insert(0, Refuse())
from pathlib import Path
import numpy as np
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines.aoti import open_package
places = {{name: (Path(path), Reference(*rest)) for name, (path, *rest) in json.loads({json.dumps(text)!r}).items()}}
package = Path({str(package)!r})
engine = open_package(package, package.with_suffix(".safetensors"), places, threads=1)
outputs = engine.run(dict(np.load({str(tmp_path / "in.npz")!r})), ["features"])
np.save({str(tmp_path / "out.npy")!r}, outputs["features"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(weights, inputs)[0], atol=2e-6)


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        ({"image": np.zeros((1, 3, 5, 4), np.float32)}, UsageError, "input 'image' has sizes [1, 3, 5, 4]"),
        ({"image": np.zeros((1, 4, 4, 4), np.float32)}, UsageError, "input 'image' has sizes [1, 4, 4, 4]"),
        ({"image": np.zeros((3, 4, 4), np.float32)}, UsageError, "input 'image' has sizes [3, 4, 4]"),
        ({"image": np.zeros((32, 3, 4, 4), np.float32)}, UsageError, "input 'image' has sizes [32, 3, 4, 4]"),
        ({"image": np.zeros((0, 3, 4, 4), np.float32)}, UsageError, "input 'image' has sizes [0, 3, 4, 4]"),
        ({"time": np.zeros(3, np.float32)}, UsageError, "input 'image' has sizes [2, 3, 4, 4]"),
        ({"time": np.zeros(1, np.float64)}, BundleError, "input 'time' is float64, not float32"),
        ({"other": np.zeros(1, np.float32)}, BundleError, "has no input 'other'"),
        ({"time": None}, BundleError, "input 'time' is missing"),
    ],
)
def test_inputs_that_the_package_does_not_take_are_refused(package, tmp_path, change, kind, said):
    engine = opened(package, stored(tmp_path, 1)[0])
    inputs = {name: array for name, array in (feed(2, 4, 4, 1) | change).items() if array is not None}
    with pytest.raises(kind) as caught:
        engine.run(inputs, ["features"])
    assert said in str(caught.value) and str(caught.value).isprintable()


def test_packages_that_cannot_be_opened_are_refused_in_one_line(package, tmp_path):
    places, _ = stored(tmp_path, 1)
    shutil.copyfile(package.with_suffix(".safetensors"), tmp_path / "float32.safetensors")
    broken = tmp_path / "float32.pt2"
    lacking = {name: place for name, place in places.items() if name != "late.bias"}
    for data, weights, said in (
        (package.read_bytes()[:5000], places, "damaged"),
        (b"", places, "damaged"),
        (package.read_bytes(), lacking, "reads weight 'late.bias', which the bundle does not list"),
    ):
        broken.write_bytes(data)
        with pytest.raises(BundleError) as caught:
            opened(broken, weights)
        assert said in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_a_failing_compiler_is_one_error_with_a_command_that_fails_alike(tmp_path, monkeypatch):
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$1" in *version) exec g++ "$@";; esac\necho out of ideas >&2\nexit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    with (
        torch._inductor.config.patch("cpp.cxx", (None, str(compiler))),
        pytest.raises(BuildError, match="cannot compile the small one") as caught,
    ):
        aoti.compile_network(SPEC, TYPES, "float32", tmp_path / "package", "the small one")
    (command,) = caught.value.repeat
    program, *words = shlex.split(command)
    assert program == "python"
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1 and "out of ideas" in done.stderr and not (tmp_path / "again.pt2").exists()
