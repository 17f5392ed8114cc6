"""A packed bundle's graphs open where they lie in eight tools that are not ours, and give our engine's numbers.

reader                  opens  runs
ONNX Runtime            yes    yes
onnx.checker, full      yes
onnx.shape_inference    yes
OpenVINO                yes    yes     with --ops standard: it does not run a model's own functions
Polygraphy              yes    yes
Netron                  yes            and shows every weight
quantize_dynamic        yes    yes
quantize_static         yes    yes
"""

import hashlib
import shutil

import numpy as np
import onnx
import pytest

from support.readers import READERS, netron
from support.recorded import recorded
from support.systems import EVERY_SYSTEM
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.runtime.bundle.external_data import external_data
from tilewright.runtime.bundle.read import read_bundle

ROUNDING = 2e-5  # relative L2, float32 against float32 in another order
QUANTISERS = [reader for reader in READERS if reader.startswith("quantize")]
FUNCTIONS = sorted(READERS.keys() - {"openvino", *QUANTISERS})  # readers that take a model's own functions


@pytest.fixture(scope="module")
def packed(cache, tmp_path_factory):
    """Build a system's tiny bundle, packed, once; its place and its components' calls. Do not change it."""
    built = {}

    def bundle(system, ops):
        if (system, ops) not in built:
            root = tmp_path_factory.mktemp("packed") / f"{system}-{ops}"
            build(Request(system, "tiny", root, seed=0, pack=True, verify="never", ops=ops))
            built[system, ops] = root, recorded(root)
        return built[system, ops]

    return bundle


@pytest.fixture(scope="module", params=EVERY_SYSTEM)
def system(request):
    return request.param


def assert_same(ours, theirs):
    """Floats within rounding, integers exactly."""
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        other = np.asarray(theirs[name])
        assert other.shape == array.shape
        if array.dtype.kind == "f":
            error = np.linalg.norm((other - array).astype(np.float64))
            assert error <= ROUNDING * np.linalg.norm(array.astype(np.float64)) + 1e-7
        else:
            np.testing.assert_array_equal(other, array)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ops", "reader"),
    [*(("standard", reader) for reader in READERS), *(("tilewright", reader) for reader in FUNCTIONS)],
)
def test_a_stock_reader_opens_every_graph_where_it_lies(packed, system, ops, reader, tmp_path):
    root, calls = packed(system, ops)
    components = read_bundle(root).manifest.components
    assert calls.keys() == components.keys()
    for component, (inputs, outputs) in calls.items():
        graph = components[component].graph
        if ops == "tilewright" and (root / graph).read_bytes() == (packed(system, "standard")[0] / graph).read_bytes():
            continue  # no op of ours is in it, and a case above reads the same graph
        theirs = READERS[reader](root / graph, inputs, tmp_path)
        if theirs is not None:
            assert_same(outputs, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("quantiser", QUANTISERS)
def test_a_quantiser_takes_our_functions(packed, quantiser, tmp_path):
    root, calls = packed("hitoksr", "tilewright")  # one system: they take seconds for each graph
    for component, (inputs, _) in calls.items():
        assert READERS[quantiser](root / f"{component}.onnx", inputs, tmp_path) is None


@pytest.mark.parametrize("ops", ["standard", "tilewright"])
def test_netron_shows_every_node_and_weight_where_it_lies(packed, system, ops, tmp_path):
    if shutil.which("node") is None:
        pytest.skip("Netron's reader is JavaScript, and node is not installed")
    root, calls = packed(system, ops)
    shown = netron([root / f"{component}.onnx" for component in calls], tmp_path)
    for component in calls:
        graph, answer = root / f"{component}.onnx", shown[f"{component}.onnx"]
        data = {n: ((root / w.location).read_bytes(), w) for n, w in external_data(graph.read_bytes(), "").items()}
        digests = {n: hashlib.sha256(of[w.offset : w.offset + w.length]).hexdigest() for n, (of, w) in data.items()}
        assert answer["nodes"] == len(onnx.load(graph, load_external_data=False).graph.node)
        assert {n: d for n, d in answer["tensors"].items() if n in digests} == digests


def test_the_readers_are_eight():
    assert len([*READERS, netron]) == 8
