"""ONNX Runtime as an engine: right answers from mapped weights, and a line that says why when it cannot run."""

import importlib.util
import re
import shutil
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from support.loops import filtered
from tilewright.runtime import load
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import BACKENDS, Opening, backend, ort
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def refusal(act, *arguments, **options) -> str:
    with pytest.raises(BundleError) as caught:
        act(*arguments, **options)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) <= 600  # with the path of a test, which is long
    return text


def opened(whole: Bundle, component: str, **options) -> ort.OrtEngine:
    """The only engine of a component."""
    (spec,) = whole.manifest.components[component].engines
    return ort.open_engine(whole, component, spec, Opening(**options))


@pytest.fixture
def engine(bundle):
    engine = opened(read_bundle(bundle), "sharpen")
    yield engine
    engine.close()


@pytest.mark.parametrize("packed", [False, True], ids=["external", "packed"])
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (2, 3, 8, 24)])
def test_the_answer_is_that_of_a_convolution_in_loops(build, kernels, packed, memory, shape):
    engine = opened(read_bundle(build(packed=packed)), "sharpen", memory=memory)
    image = noise(*shape)
    outputs = engine.run({"image": image}, ["sharp"])
    assert list(outputs) == ["sharp"]
    assert outputs["sharp"].dtype == np.float32
    np.testing.assert_allclose(outputs["sharp"], filtered(image, kernels), atol=1e-6)


def test_low_and_fast_memory_give_equal_answers(bundle):
    low, fast = (opened(read_bundle(bundle), "sharpen", memory=memory) for memory in ("low", "fast"))
    image = noise(3, 3, 40, 56)
    one, other = (engine.run({"image": image}, ["sharp"])["sharp"] for engine in (low, fast))
    np.testing.assert_allclose(one, other, atol=1e-6)


def hugging_face(folder: Path, cache: Path) -> Path:
    """A snapshot of a folder's files in a cache as Hugging Face lays it out: links to blobs, which are named alike."""
    root = cache / "models--org--name"
    snapshot = root / "snapshots" / ("5" * 40)
    (root / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(snapshot.name)
    for file in folder.iterdir():
        blob = root / "blobs" / sha256_of_file(file)
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16])
@pytest.mark.parametrize("linked", [False, True], ids=["files", "links"])
def test_low_memory_holds_no_copy_of_weights(tmp_path, kind, linked):
    side = 4096
    width = {1: 4, 10: 2, 16: 2}[kind]
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "weights.bin").write_bytes(bytes(width * side * side))
    weight = TensorProto(name="w", data_type=kind, dims=[side, side], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": "weights.bin", "offset": "0", "length": str(width * side * side)}.items():
        weight.external_data.add(key=key, value=value)
    nodes = [helper.make_node("Cast", ["w"], ["wide"], to=TensorProto.FLOAT)]
    nodes.append(helper.make_node("MatMul", ["x", "wide"], ["y"]))
    ends = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, side])] for name in "xy")
    graph = helper.make_graph(nodes, "cast", *ends, [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    place = hugging_face(folder, tmp_path / "hub") if linked else folder
    code = f"""
from pathlib import Path
from tilewright.runtime.engines.ort import open_graph
def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
import onnxruntime
before = held()
files = {{"weights.bin": Path({str(place / "weights.bin")!r})}}
engine = open_graph(Path({str(tmp_path / "model.onnx")!r}), files, memory="low", threads=1)
print(held() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells what a process holds of its own")
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert int(printed) < side * side * width / 1024 / 2


def test_low_memory_turns_off_what_copies_the_weights(bundle):
    options = opened(read_bundle(bundle), "sharpen", memory="low").session.get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.slow
def test_calls_of_all_engines_share_memory_which_goes_back_when_one_is_closed(tmp_path):
    nodes = [helper.make_node("Exp", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    nodes.append(helper.make_node("ReduceSum", ["b"], ["y"]))
    ends = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)] for name, shape in (("x", ["n"]), ("y", [1]))
    )
    graph = helper.make_graph(nodes, "large", *ends)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    code = f"""
from pathlib import Path
import numpy as np
from tilewright.runtime.engines.ort import open_graph
def held():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("RssAnon"))
x = np.ones(20_000_000, np.float32)
engines = [open_graph(Path({str(tmp_path / "model.onnx")!r}), {{}}, threads=1) for _ in range(3)]
before = held()
for engine in engines:
    engine.run({{"x": x}}, ["y"])
    print(held() - before)
engines[0].close()
print(held() - before)
"""
    if not Path("/proc/self/status").exists():
        pytest.skip("only Linux tells what a process holds of its own")
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    first, second, third, closed = map(int, printed.split())
    value = 4 * 20_000_000 / 1024
    assert value / 2 < first < 3 * value
    assert second < first + value / 2 and third < first + value / 2
    assert closed < value / 8


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_the_number_of_threads_is_the_one_asked_for(bundle, threads):
    engine = opened(read_bundle(bundle), "sharpen", threads=threads)
    assert engine.session.get_session_options().intra_op_num_threads == threads


def test_weights_are_read_where_they_lie(bundle, weights_dir, kernels, tmp_path):
    given = tmp_path / "given"
    weights_dir.rename(given)
    assert "are in none of" in refusal(opened, read_bundle(bundle), "sharpen")
    image = noise(1, 3, 8, 8)
    for place in (given, given / ".." / "given", tmp_path / "models" / ".." / "given"):
        engine = opened(read_bundle(bundle), "sharpen", weights_dir=place)
        np.testing.assert_allclose(
            engine.run({"image": image}, ["sharp"])["sharp"], filtered(image, kernels), atol=1e-6
        )


def test_a_bundle_and_weights_given_by_relative_paths_run(bundle, weights_dir, tmp_path, monkeypatch):
    weights_dir.rename(tmp_path / "given")
    monkeypatch.chdir(tmp_path)
    engine = opened(read_bundle(bundle.name), "sharpen", weights_dir=Path("given"))
    assert engine.run({"image": noise(1, 3, 8, 8)}, ["sharp"])["sharp"].shape == (1, 3, 8, 8)


def test_packed_weights_of_a_bundle_given_by_a_relative_path_run(packed_bundle, monkeypatch):
    monkeypatch.chdir(packed_bundle.parent)
    engine = opened(read_bundle(packed_bundle.name), "sharpen")
    assert engine.run({"image": noise(1, 3, 8, 8)}, ["sharp"])["sharp"].shape == (1, 3, 8, 8)


def test_four_threads_at_once_get_each_its_own_answer(engine):
    images = [noise(1, 3, 32, 32, seed=seed) for seed in range(100)]
    alone = [engine.run({"image": image}, ["sharp"])["sharp"] for image in images]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda image: engine.run({"image": image}, ["sharp"])["sharp"], images))
    np.testing.assert_allclose(together, alone, atol=1e-6)


# Weights in two folders


def added(image: np.ndarray, tensors) -> np.ndarray:
    """What a graph over both folders' numbers must give."""
    scale, *rest = (
        np.float64(tensors[f][n][1]) for f, n in (("base", "scale"), *(("extra", n) for n in tensors["extra"]))
    )
    return image * scale[:, None, None] + sum(rest)[:, None, None]


@pytest.mark.parametrize("packed", [False, True], ids=["external", "packed"])
@pytest.mark.parametrize("memory", ["fast", "low"])
def test_weights_of_two_folders_and_three_types_meet_in_one_session(two_folder_bundle, two_folders, packed, memory):
    root = two_folder_bundle(packed=packed)
    if packed:
        for folder in ("models", "other"):
            (root.parent / folder).rename(root.parent / f"{folder}.gone")
    whole = read_bundle(root)
    references = whole.weights.tensors["add"]
    assert {name: r.folder for name, r in references.items()} == {
        "scale": "base",
        **dict.fromkeys(two_folders["extra"], "extra"),
    }
    assert {r.dtype for r in references.values()} == {"float32", "float16", "bfloat16"}
    engine = opened(whole, "add", memory=memory)
    for image in (noise(1, 3, 8, 8), noise(2, 3, 16, 8)):
        np.testing.assert_allclose(engine.run({"image": image}, ["sum"])["sum"], added(image, two_folders), atol=1e-6)
    engine.close()
    assert engine.session is None


@pytest.mark.parametrize("name", ["base", "extra"])
def test_a_file_is_the_one_that_the_caller_says(two_folder_bundle, two_folders, tmp_path, name):
    whole = read_bundle(two_folder_bundle())
    files = whole.files_of("add")
    place = f"weights/{name}/weights.safetensors"
    other = tmp_path / "else.bin"
    tensors = {n: r for n, r in whole.weights.tensors["add"].items() if r.folder == name}
    data = bytearray(files[place].read_bytes())
    for r in tensors.values():  # each number twice as large: one more in the exponent
        numbers = {"float32": "<3f", "float16": "<3e", "bfloat16": None}[r.dtype]
        if numbers:
            doubled = struct.pack(numbers, *(2 * x for x in struct.unpack_from(numbers, data, r.offset)))
        else:
            wide = b"".join(b"\0\0" + data[r.offset + i : r.offset + i + 2] for i in (0, 2, 4))
            doubled = b"".join(struct.pack("<f", 2 * x)[2:] for x in struct.unpack("<3f", wide))
        data[r.offset : r.offset + r.length] = doubled
    other.write_bytes(data)
    engine = ort.open_graph(whole.path("add.onnx"), files | {place: other})
    image = noise(1, 3, 8, 8)
    twice = {n: (dtype, [2 * x for x in numbers]) for n, (dtype, numbers) in two_folders[name].items()}
    expected = added(image, two_folders | {name: twice})
    np.testing.assert_allclose(engine.run({"image": image}, ["sum"])["sum"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "places", [("given/base", "given/extra"), ("given/base", "given/a/extra"), ("given/b/base", "given/a/extra")]
)
def test_two_folders_that_moved_are_found_under_the_one_that_is_given(two_folder_bundle, two_folders, tmp_path, places):
    root = two_folder_bundle()
    for old, place in zip(("models/base", "other/extra"), places, strict=True):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / old).rename(tmp_path / place)
    assert "weights weights.safetensors of 'base' are in none of" in refusal(opened, read_bundle(root), "add")
    image = noise(1, 3, 8, 8)
    engine = opened(read_bundle(root), "add", weights_dir=tmp_path / "given")
    np.testing.assert_allclose(engine.run({"image": image}, ["sum"])["sum"], added(image, two_folders), atol=1e-6)


def test_one_folder_that_moved_is_found_and_the_other_where_it_was(two_folder_bundle, two_folders, tmp_path):
    root = two_folder_bundle()
    (tmp_path / "other" / "extra").rename(tmp_path / "moved")
    assert "of 'extra' are in none of" in refusal(opened, read_bundle(root), "add")
    (tmp_path / "given").mkdir()
    (tmp_path / "moved").rename(tmp_path / "given" / "extra")
    image = noise(1, 3, 8, 8)
    engine = opened(read_bundle(root), "add", weights_dir=tmp_path / "given")
    np.testing.assert_allclose(engine.run({"image": image}, ["sum"])["sum"], added(image, two_folders), atol=1e-6)


@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "moved"])
def test_weights_in_a_hugging_face_cache_run_linked_or_copied(build, weights_dir, kernels, tmp_path, memory, moved):
    root, image = build(), noise(1, 3, 8, 8)
    snapshot = hugging_face(weights_dir, tmp_path / "hub")
    shutil.copytree(snapshot, tmp_path / "copied")
    shutil.rmtree(weights_dir)
    if moved:
        (tmp_path / "hub").rename(tmp_path / "moved")
        snapshot = tmp_path / "moved" / snapshot.relative_to(tmp_path / "hub")
    else:
        weights_dir.symlink_to(snapshot)
    for place in (snapshot, tmp_path / "copied", *([] if moved else [None])):
        engine = opened(read_bundle(root), "sharpen", memory=memory, weights_dir=place)
        answer = engine.run({"image": image}, ["sharp"])["sharp"]
        np.testing.assert_allclose(answer, filtered(image, kernels), atol=1e-6)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_one_folder_of_links_and_one_of_files_meet_in_one_session(two_folder_bundle, two_folders, tmp_path, memory):
    root = two_folder_bundle()
    for folder in ("models/base", "other/extra"):
        snapshot = hugging_face(tmp_path / folder, tmp_path / "hub" / folder)
        shutil.rmtree(tmp_path / folder)
        (tmp_path / folder).symlink_to(snapshot)
        engine = opened(read_bundle(root), "add", memory=memory)
        image = noise(1, 3, 8, 8)
        answer = engine.run({"image": image}, ["sum"])["sum"]
        np.testing.assert_allclose(answer, added(image, two_folders), atol=1e-6)


def test_a_link_to_other_bytes_is_refused(bundle, weights_dir, tmp_path):
    snapshot = hugging_face(weights_dir, tmp_path / "hub")
    blob = (snapshot / "sharpen.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    shutil.rmtree(weights_dir)
    text = refusal(opened, read_bundle(bundle), "sharpen", weights_dir=snapshot)
    assert text.startswith(f"{snapshot / 'sharpen.safetensors'}: SHA-256 differs")


@pytest.mark.parametrize("folder", ["models/base", "other/extra"])
def test_changed_weights_of_either_folder_are_refused(two_folder_bundle, tmp_path, folder):
    root, path = two_folder_bundle(), tmp_path / folder / "weights.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert refusal(opened, read_bundle(root), "add").startswith(f"{path}: SHA-256 differs from the sealed ")


@pytest.mark.parametrize("data", [b"", b"\0" * 100, b"not a graph", b"\x08\x0a:\xff\xff", bytes(range(256))])
def test_a_broken_graph_is_refused_in_one_line(tmp_path, data):
    (tmp_path / "model.onnx").write_bytes(data)
    text = refusal(ort.open_graph, tmp_path / "model.onnx", {})
    assert text.startswith(f"{tmp_path / 'model.onnx'}: onnxruntime ")
    assert re.search(r"\); (the graph is damaged|a file is damaged or has moved): .* rebuild the bundle$", text)


def test_a_missing_graph_is_refused_in_one_line(tmp_path):
    assert refusal(ort.open_graph, tmp_path / "model.onnx", {}).startswith(f"{tmp_path / 'model.onnx'}: ")


@pytest.mark.parametrize("length", [0, 100])
def test_a_graph_whose_weights_are_cut_short_is_refused_in_one_line(bundle, tmp_path, length):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "sharpen.safetensors").write_bytes(bytes(length))
    files = {"weights/sharpen/sharpen.safetensors": tmp_path / "empty" / "sharpen.safetensors"}
    text = refusal(ort.open_graph, bundle / "sharpen.onnx", files)
    assert text.startswith(f"{bundle / 'sharpen.onnx'}: onnxruntime ")


def test_without_onnx_runtime_the_line_says_what_to_install(bundle, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "onnxruntime" else find(name, *rest)
    )
    for act in (lambda: backend("ort"), lambda: load(bundle)):
        with pytest.raises(
            EnvironmentMismatch, match=r"needs ONNX Runtime: pip install 'tilewright\[cpu\]'$"
        ) as caught:
            act()
        assert caught.value.exit_code == 4


def test_an_unknown_backend_is_named_with_those_there_are():
    with pytest.raises(EnvironmentMismatch, match=r"^engine backend 'abacus' is not one of ort.*; upgrade") as caught:
        backend("abacus")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_has_the_three_functions(name):
    module = importlib.import_module(BACKENDS[name])
    assert all(callable(getattr(module, function)) for function in ("missing", "version", "open_engine"))
    if module.missing() is None:
        assert module.version()


def test_running_out_of_memory_in_the_engine_says_what_to_do(engine, monkeypatch):
    class Full:
        def run(self, names, inputs, options):
            raise RuntimeError("Non-zero status code\nFailed to allocate memory for requested buffer of size 99")

    monkeypatch.setattr(engine, "session", Full())
    with pytest.raises(ResourceError, match="use a smaller --tile") as caught:
        engine.run({}, ["sharp"])
    assert str(caught.value).isprintable()
