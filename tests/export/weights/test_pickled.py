"""PyTorch pickles: the tensors that the safetensors package then reads, no code run, or one line why not."""

import collections
import os
import pickle
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tilewright.export.build.clean import clean
from tilewright.export.weights import pickled
from tilewright.export.weights.files import PICKLED, converted, find, open_reference
from tilewright.export.weights.pickled import as_safetensors, first_element
from tilewright.runtime.bundle.safetensors import SAFETENSORS_DTYPES
from tilewright.runtime.errors import InputError

WIDTHS = dict(SAFETENSORS_DTYPES.values())


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def refusal(path: Path) -> str:
    """The one line after the file's name; nothing is left in the cache, and nobody is told to run the code."""
    with pytest.raises(InputError) as caught:
        as_safetensors(path)
    text = str(caught.value)
    assert text.startswith(f"weights {path}: ") and text.isprintable()
    assert not any(word in text for word in ("weights_only", "add_safe_globals", "option"))
    assert not list(Path(os.environ["TILEWRIGHT_CACHE_DIR"]).glob("converted/*/*"))
    return text.removeprefix(f"weights {path}: ")


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    read = load_file(as_safetensors(path))
    assert read.keys() == expected.keys() == find(as_safetensors(path)).tensors.keys()
    for name, tensor in expected.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        bits = [t.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for t in (read[name], tensor)]
        assert torch.equal(*bits)


def test_every_dtype_and_shape_comes_through_with_its_bits_and_aligned(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{dtype}.{len(shape)}": torch.randn(shape, generator=generator).mul(9).to(getattr(torch, dtype))
        for dtype in reversed(WIDTHS)
        for shape in [(), (3,), (2, 1, 5)]
    }
    tensors["nan"] = torch.tensor([float("nan"), -0.0, float("inf")], dtype=torch.bfloat16)
    path = saved(tmp_path / "all.pt", tensors)
    same(path, tensors)
    assert all(r.offset % WIDTHS[r.dtype] == 0 for r in find(as_safetensors(path)).tensors.values())
    with safe_open(as_safetensors(path), "pt") as file:
        assert file.metadata() == {"note": "converted by tilewright from all.pt"}


@pytest.mark.parametrize("suffix", PICKLED)
@pytest.mark.parametrize("way", ["zip", "legacy", "compressed"])
def test_every_way_of_saving_gives_the_same_tensors(tmp_path, suffix, way):
    base, noise = torch.arange(24.0).reshape(4, 6), torch.arange(5000).sin()
    content = {
        "plain": noise,
        "turned": base.T,
        "shared": base,
        "view": base[1:3, ::2],
        "repeated": torch.ones(1).expand(3, 2),
        "negated": torch._neg_view(torch.ones(3)),
        "learned": nn.Parameter(torch.ones(2)),
        "again": noise,
    }
    path = saved(tmp_path / f"model{suffix}", content, _use_new_zipfile_serialization=way != "legacy")
    if way == "compressed":
        stored = path.rename(tmp_path / "stored")
        with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
    same(path, content)


NAMES = st.text("abc01_é", min_size=1, max_size=4)
STORED = [getattr(torch, dtype) for dtype in sorted(WIDTHS)]


@st.composite
def some_tensor(draw) -> torch.Tensor:
    """Contiguous or not, alone in its storage or not, a parameter or not."""
    shape = draw(st.lists(st.integers(1, 4), max_size=3))
    base = torch.arange(float(np.prod([2, *shape]))).reshape(2, *shape).to(draw(st.sampled_from(STORED)))
    way = draw(st.sampled_from(["whole", "a row", "turned", "wide", "learned"]))
    if way == "turned":
        return base.permute(*reversed(range(base.ndim)))
    if way == "learned":
        return nn.Parameter(base, requires_grad=False)
    return {"whole": base, "a row": base[1], "wide": base[:1].expand(3, *shape)}[way]


STATES = st.recursive(
    st.one_of(some_tensor(), st.just(nn.Linear(2, 3).weight)),  # the second one is shared by all that hold it
    lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=4).flatmap(
        lambda made: st.sampled_from([made, collections.OrderedDict(made)])
    ),
    max_leaves=8,
)


def flat(state: dict[str, Any], before: str = "") -> dict[str, torch.Tensor]:
    made: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        made |= flat(value, f"{before}{name}.") if isinstance(value, dict) else {f"{before}{name}": value}
    return made


@pytest.mark.slow
@settings(deadline=None, max_examples=150)
@given(st.dictionaries(NAMES, STATES, min_size=1, max_size=4), st.booleans())
def test_what_is_listed_without_loading_is_what_torch_loads(state, legacy):
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder) / "model.pt", state, _use_new_zipfile_serialization=not legacy)
        if legacy and any("float8" in str(tensor.dtype) for tensor in flat(state).values()):
            with pytest.raises(AttributeError):
                torch.load(path, weights_only=True)
            with pytest.raises(InputError):
                find(path)
            return
        theirs = flat(torch.load(path, weights_only=True))
        found = find(path)
        assert found.pickles == {"model.pt"} and found.folder == path.parent.resolve()
        ours = {name: (r.dtype, r.shape, r.length) for name, r in found.tensors.items()}
        assert ours == {n: (str(t.dtype).removeprefix("torch."), tuple(t.shape), t.nbytes) for n, t in theirs.items()}
        for name, tensor in theirs.items():
            first = tensor.detach().contiguous().reshape(-1)[:1].view(torch.uint8).numpy().tobytes()
            assert first_element(path, name) == first


@settings(deadline=None, max_examples=25)
@given(st.dictionaries(NAMES, STATES, min_size=1, max_size=3), st.booleans())
def test_what_is_listed_is_what_is_converted(state, legacy):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("TILEWRIGHT_CACHE_DIR", f"{folder}/cache")
        legacy = legacy and not any("float8" in str(tensor.dtype) for tensor in flat(state).values())
        path = saved(Path(folder) / "model.pt", state, _use_new_zipfile_serialization=not legacy)
        found = find(path)
        made = converted(found)
        assert not made.pickles and list(made.sources.values()) == [str(path)]
        assert {n: replace(r, file="", offset=0) for n, r in made.tensors.items()} == {
            n: replace(r, file="", offset=0) for n, r in found.tensors.items()
        }
        assert load_file(made.folder / next(iter(made.sources))).keys() == made.tensors.keys()


def test_listing_converts_nothing_and_loads_no_torch(tmp_path, own_cache):
    for way in (True, False):
        saved(tmp_path / "model.pt", {"a": torch.ones(3)}, _use_new_zipfile_serialization=way)
        code = "import sys, pathlib; from tilewright.export.weights.files import find\n"
        code += "print(*find(pathlib.Path(sys.argv[1])).tensors); print(*sys.modules)"
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
        assert "holds no .safetensors file" in done.stderr  # a folder's are looked for as .bin only
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], capture_output=True, text=True)
        names, modules = done.stdout.splitlines()
        assert names == "a" and "torch" not in modules.split()
    assert not (own_cache / "converted").exists()


def test_shards_of_pickles_are_files_of_one_folder_before_and_after(tmp_path, own_cache):
    for i, name in enumerate("ab"):
        saved(tmp_path / f"pytorch_model-{i}.bin", {name: torch.full((3,), float(i))})
    found = find(tmp_path)
    assert found.pickles == set(found.sources) == {"pytorch_model-0.bin", "pytorch_model-1.bin"}
    made = converted(found)
    assert made.folder == own_cache / "converted" and converted(made) is made
    assert sorted(made.sources.values()) == [str(tmp_path / f"pytorch_model-{i}.bin") for i in range(2)]
    assert bytes(open_reference(made.folder, made.tensors["b"])) == torch.ones(3).numpy().tobytes()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("way", ["opcode", "offset", "count", "storage"])
def test_a_header_that_lies_is_refused_and_torch_would_too(tmp_path, way):
    path = saved(tmp_path / "whole.pt", {"a": torch.ones(5, 5)})
    lying = tmp_path / "model.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(lying, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("data.pkl"):
                data = {
                    "opcode": b"\x80\x04\x95" + bytes(8) + b"}.",
                    "offset": data.replace(b"QK\x00", b"QK\x07"),
                    "count": data.replace(b"K\x19t", b"K\x29t").replace(b"K\x05K\x05\x86", b"K\x06K\x06\x86"),
                    "storage": data,
                }[way]
                assert way == "storage" or data != old.read(name)
            if not (way == "storage" and "/data/" in name):
                new.writestr(name, data)
    assert refusal(lying).startswith("is no file of tensors that torch.save wrote, or damaged (")
    with pytest.raises(InputError):
        find(lying)
    with pytest.raises(Exception, match=r".+"):
        torch.load(lying, weights_only=True)


class Hiding(dict[str, Any]):
    def __reduce__(self):
        return collections.OrderedDict, (), {"items": 3}, None, iter(dict.items(self))


def test_an_attribute_that_hides_a_dicts_method_changes_nothing(tmp_path):
    same(saved(tmp_path / "model.pt", {"x": Hiding(a=torch.ones(1))}), {"x.a": torch.ones(1)})


def test_nested_dicts_are_joined_and_a_lone_state_dict_is_unwrapped(tmp_path):
    one, two = torch.ones(1), torch.zeros(2)
    inner = collections.OrderedDict(latents=one, layers={0: {"w": two}, 1: collections.OrderedDict(w=one)})
    expected = {"image_proj.latents": one, "image_proj.layers.0.w": two, "image_proj.layers.1.w": one}
    same(saved(tmp_path / "a.bin", {"image_proj": inner}), expected)
    same(saved(tmp_path / "b.ckpt", {"state_dict": {"image_proj": inner}}), expected)
    same(saved(tmp_path / "c.pth", {"state_dict": one}), {"state_dict": one})
    same(saved(tmp_path / "d.pt", {"state_dict": {"x": one}, "ema": two}), {"state_dict.x": one, "ema": two})
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    same(saved(tmp_path / "e.pt", network.state_dict()), network.state_dict())
    assert as_safetensors(tmp_path / "a.bin") != as_safetensors(tmp_path / "b.ckpt")


def test_the_second_time_nothing_is_loaded_and_clean_leaves_it(tmp_path, monkeypatch, own_cache):
    path = saved(tmp_path / "model.pt", {"a": torch.ones(3)})
    made = as_safetensors(path)
    assert (made.parent.parent, len(made.parent.name), made.name) == (own_cache / "converted", 32, "model.safetensors")
    before = made.stat()
    clean()
    monkeypatch.setattr(torch, "load", None)
    assert as_safetensors(path) == made
    assert (made.stat().st_mtime_ns, made.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    monkeypatch.setattr(pickled, "VERSION", pickled.VERSION + 1)
    with pytest.raises(InputError, match="TypeError"):  # another converter does load
        as_safetensors(path)


class Command(str):
    def __reduce__(self):
        return os.system, (str(self),)


@pytest.mark.parametrize("way", ["zip", "legacy", "pickle 2", "pickle 4"])
def test_code_is_not_run(tmp_path, way, recwarn):
    path, marker = tmp_path / "model.pt", tmp_path / "marker"
    content = {"a": torch.ones(1), "b": Command(f"touch {marker}")}
    saved(path, content, _use_new_zipfile_serialization=way == "zip")
    if way.startswith("pickle"):
        path.write_bytes(pickle.dumps(content["b"], int(way[-1])))
    text = refusal(path)
    assert not marker.exists() and not recwarn.list
    if way != "pickle 4":  # whose opcodes torch does not even read
        assert text.startswith(f"holds more than tensors ({os.system.__module__}.system), which is not loaded; ")
    pickle.loads(pickle.dumps(content["b"]))  # it would have been
    assert marker.exists()


LOOP: dict[str, Any] = {"a": torch.ones(1)}
LOOP["b"] = LOOP
REFUSED = {
    "an array": ({"a": np.zeros(3)}, "holds more than tensors (numpy."),
    "a module": (nn.Linear(1, 1), "holds more than tensors (torch.nn.modules.linear.Linear), which is "),
    "a tensor": (torch.ones(1), "holds a Tensor, not a dict of tensors; save"),
    "nothing": ({}, "the dict is empty; "),
    "a number": ({"a": torch.ones(1), "optimizer": {"epoch": 3}}, "'optimizer.epoch' is of type int, not a tensor; "),
    "a text": ({"state_dict": {"w": "x"}}, "'w' is of type str, not a tensor; "),
    "none": ({"w": None}, "'w' is of type NoneType, not a tensor; "),
    "nothing inside": ({"a": torch.ones(1), "w": {"x": {}}}, "the dict 'w.x' is empty; "),
    "a dict in itself": (LOOP, "the dict 'b' is held in two places; "),
    "an outer number": ({0: torch.ones(1)}, "0 in '' is no name of a tensor; "),
    "a truth as name": ({"a": {True: torch.ones(1)}}, "True in 'a' is no name of a tensor; "),
    "an odd name": ({"a": {"b\n\x1b": torch.ones(1)}}, "'b\\n\\x1b' in 'a' is no name of a tensor; "),
    "a taken name": ({"__metadata__": torch.ones(1)}, "'__metadata__' is a name that safetensors keeps for itself; "),
    "a name twice": ({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)}, "'a.b' is the name of two tensors; "),
    "sparse": ({"w": torch.eye(2).to_sparse()}, "'w' is a sparse, nested or meta tensor, not a plain one; "),
    "meta": ({"w": torch.ones(2, device="meta")}, "'w' is a sparse, nested or meta tensor, not a plain one; "),
    "complex": ({"w": torch.ones(2, dtype=torch.complex64)}, "'w' is complex64, not one of bfloat16, bool, "),
    "no numbers": ({"w": torch.ones(3, 0)}, "'w' is empty, [3, 0]; "),
    "unsigned": ({"w": torch.ones(2).to(torch.uint16)}, "'w' is uint16, not one of "),
    "a bomb": ({"w": torch.ones(1).expand(1 << 40)}, "'w' would be 4398046511104 bytes, from a file of "),
}


@pytest.mark.parametrize("content, complaint", REFUSED.values(), ids=REFUSED)
def test_anything_but_plain_tensors_is_refused_by_name(tmp_path, content, complaint):
    text = refusal(saved(tmp_path / "model.pt", content))
    assert text.startswith(complaint)
    assert text.endswith("; save its state_dict alone, or convert it to safetensors")


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantised_tensor_is_refused_by_name(tmp_path):
    content = {"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)}
    assert refusal(saved(tmp_path / "model.pt", content)).startswith("'w' is qint8, not one of bfloat16, bool, ")


@pytest.mark.parametrize("way", ["empty", "text", "pickle 2", "pickle 5", "legacy", "zip", "a zip of others", "jit"])
def test_a_damaged_or_foreign_file_is_refused(tmp_path, way):
    path = saved(tmp_path / "model.bin", {"a": torch.ones(999)}, _use_new_zipfile_serialization=way != "legacy")
    whole = path.read_bytes()
    if way == "a zip of others":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/notes.txt", "no weights")
    elif way == "jit":
        torch.jit.trace(nn.Linear(1, 1), torch.ones(1)).save(path)
    elif way.startswith("pickle"):
        path.write_bytes(pickle.dumps({"a": [1.0]}, int(way[-1])))
    else:
        path.write_bytes({"empty": b"", "text": b"hello\nworld\n"}.get(way, whole[: len(whole) * 2 // 3]))
    text = refusal(path)
    assert text.startswith("is no file of tensors that torch.save wrote, or damaged (")
    assert text.endswith("); copy it again, or convert it to safetensors")


def test_a_file_that_cannot_be_read_or_has_another_suffix_is_refused(tmp_path):
    assert refusal(tmp_path / "gone.pt") == "No such file or directory; give a file that can be read"
    (tmp_path / "folder.pt").mkdir()
    assert refusal(tmp_path / "folder.pt") == "Is a directory; give a file that can be read"
    for name in ("model.pkl", "model.safetensors", "model", ".pt"):
        (tmp_path / name).write_bytes(b"")
        assert refusal(tmp_path / name) == "is none of .pt, .bin, .pth, .ckpt; convert it to safetensors"


def test_what_fails_half_way_leaves_nothing_and_a_file_that_changes_is_refused(tmp_path, monkeypatch):
    path = saved(tmp_path / "model.pt", {"a": torch.ones(9), "b": torch.ones(9)})
    pieces = pickled._pieces

    def failing(tensor: torch.Tensor):
        yield from pieces(tensor)
        raise KeyboardInterrupt

    def changing(tensor: torch.Tensor):
        yield from pieces(tensor)
        os.utime(saved(path, {"a": torch.zeros(9), "b": torch.ones(9)}), (1, 1))

    monkeypatch.setattr(pickled, "_pieces", failing)
    with pytest.raises(KeyboardInterrupt):
        as_safetensors(path)
    monkeypatch.setattr(pickled, "_pieces", changing)
    assert refusal(path) == "was written to while it was read; try again"


PEAK = """
import sys, torch
from pathlib import Path
from tilewright.export.weights.pickled import as_safetensors
from tilewright.runtime.memory.machine import peak_bytes, reset_peak
as_safetensors(Path(sys.argv[1]))  # a small one, so that torch has all it needs
reset_peak()
start = peak_bytes()
as_safetensors(Path(sys.argv[2]))
print(peak_bytes() - start)
"""


@pytest.mark.slow
def test_a_large_file_is_never_wholly_in_memory(tmp_path):
    content = {f"layer{i}": torch.full((2_500_000,), float(i)) for i in range(20)}
    small, large = saved(tmp_path / "small.pt", {"a": torch.ones(9)}), saved(tmp_path / "large.pt", content)
    done = subprocess.run([sys.executable, "-c", PEAK, small, large], capture_output=True, text=True, check=True)
    assert large.stat().st_size > 200e6
    assert int(done.stdout) < 120e6
    assert all(torch.equal(t, content[n]) for n, t in load_file(as_safetensors(large)).items())
