"""Weights by reference: every byte where the safetensors package reads it, every key accounted for, or one line why."""

import json
import struct
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.systems import components_of
from tilewright.export.graph.trace import network_on_meta
from tilewright.export.networks.hitoksr import HiTokConfig, VisionPrior
from tilewright.export.system import Origin, Rows
from tilewright.export.systems.hitoksr.system import SYSTEM as HITOKSR
from tilewright.export.weights import files
from tilewright.export.weights.files import (
    Tensors,
    copy_tensors,
    find,
    locate,
    open_reference,
    reference_parameters,
    resolve,
)
from tilewright.export.weights.writing import random_weights
from tilewright.runtime.bundle.digests import sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError, UsageError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def refusal(act, *arguments, **options) -> str:
    """The one line that a wrong weights folder gets."""
    with pytest.raises(InputError) as caught:
        act(*arguments, **options)
    assert caught.value.exit_code == 8
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def saved(path: Path, *names: str) -> Path:
    """A file with these tensors, each different."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.full((2, 3), float(sum(name.encode()))) for name in names}, path)
    return path


def read(found: Tensors) -> dict[str, bytes]:
    return {name: bytes(open_reference(found.folder, reference)) for name, reference in found.tensors.items()}


tensors = st.dictionaries(
    st.text("abcdefgh.0123_é", min_size=1, max_size=12),
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(1, 5), max_size=4)),  # no axis: a scalar
    min_size=1,
    max_size=8,
)


def drawn(specs: dict[str, tuple[str, list[int]]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(shape, generator=generator).to(DTYPES[dtype]) for n, (dtype, shape) in specs.items()}


@settings(deadline=None, max_examples=50)
@given(tensors, st.integers(0, 2**31))
def test_references_are_the_bytes_that_the_safetensors_package_reads(specs, seed):
    made = drawn(specs, seed)
    with tempfile.TemporaryDirectory() as folder:
        save_file(made, Path(folder) / "w.safetensors", {"format": "pt"})
        found = find(Path(folder))
        theirs = load_file(Path(folder) / "w.safetensors")
        assert found.tensors.keys() == theirs.keys()
        for name, reference in found.tensors.items():
            assert (reference.dtype, list(reference.shape)) == (specs[name][0], specs[name][1])
            assert reference.file == "w.safetensors"
            assert bytes(open_reference(found.folder, reference)) == raw(theirs[name]) == raw(made[name])


def test_a_folder_a_file_and_shards_give_the_same_bytes(tmp_path):
    one = saved(tmp_path / "one" / "model.safetensors", "a", "b", "c")
    saved(tmp_path / "many" / "model-00001-of-00002.safetensors", "a", "c")
    saved(tmp_path / "many" / "deeper" / "model-00002-of-00002.safetensors", "b")
    (tmp_path / "many" / "notes.txt").write_text("not weights")
    folder, file, shards = find(one.parent), find(one), find(tmp_path / "many")
    assert read(folder) == read(file) == read(shards)
    assert set(read(folder)) == {"a", "b", "c"}
    assert folder == file == Tensors(one.parent, folder.tensors, {"model.safetensors": str(one)})
    assert set(shards.sources) == {
        "model-00001-of-00002.safetensors",
        "deeper/model-00002-of-00002.safetensors",
    }
    assert shards.tensors["b"].file == "deeper/model-00002-of-00002.safetensors"


def cached(root: Path, files: dict[str, tuple[str, ...]]) -> Path:
    """A download cache: files are links in a snapshot to blobs with the names of their hashes."""
    snapshot = root / "snapshots" / "0123abcd"
    snapshot.mkdir(parents=True)
    for file, names in files.items():
        blob = saved(root / "blobs" / sha256_of_bytes(file.encode()), *names)
        (snapshot / file).symlink_to(Path("..", "..", "blobs", blob.name))
    return snapshot


@pytest.mark.parametrize("given", ["the snapshot", "the cache", "a link to the snapshot", "a relative path"])
def test_links_are_read_through_and_keep_their_names(tmp_path, monkeypatch, given):
    root = tmp_path / "hub" / "models--maker--model"
    snapshot = cached(root, {"model-1.safetensors": ("a",), "model-2.safetensors": ("b", "c")})
    (tmp_path / "mine").symlink_to(snapshot)
    monkeypatch.chdir(tmp_path)
    folder = {
        "the snapshot": snapshot,
        "the cache": root,
        "a link to the snapshot": tmp_path / "mine",
        "a relative path": snapshot.relative_to(tmp_path),
    }[given]
    found = find(folder)
    top = root if given == "the cache" else snapshot
    under = "snapshots/0123abcd/" if given == "the cache" else ""
    assert found.folder == top.resolve() and found.folder.is_absolute()
    assert {name: r.file for name, r in found.tensors.items()} == {
        "a": f"{under}model-1.safetensors",
        "b": f"{under}model-2.safetensors",
        "c": f"{under}model-2.safetensors",
    }
    assert found.sources == {
        f"{under}model-{i}.safetensors": str(folder / f"{under}model-{i}.safetensors") for i in (1, 2)
    }
    assert read(found)["b"] == raw(torch.full((2, 3), 98.0))


def test_a_single_link_keeps_its_name(tmp_path):
    snapshot = cached(tmp_path / "m", {"model.safetensors": ("a",)})
    found = find(snapshot / "model.safetensors")
    assert (found.folder, found.tensors["a"].file) == (snapshot.resolve(), "model.safetensors")
    assert found.sources == {"model.safetensors": str(snapshot / "model.safetensors")}
    assert sha256_of_file(found.folder / "model.safetensors") == sha256_of_bytes(
        (snapshot / "model.safetensors").resolve().read_bytes()
    )


def test_links_to_different_places_are_files_of_the_folder_they_are_in(tmp_path):
    saved(tmp_path / "disk1" / "vision" / "dino.safetensors", "a")
    saved(tmp_path / "disk2" / "own.safetensors", "b")
    (tmp_path / "mine" / "deeper").mkdir(parents=True)
    (tmp_path / "mine" / "x.safetensors").symlink_to(tmp_path / "disk1" / "vision" / "dino.safetensors")
    (tmp_path / "mine" / "deeper" / "y.safetensors").symlink_to(tmp_path / "disk2" / "own.safetensors")
    found = find(tmp_path / "mine")
    assert found.folder == (tmp_path / "mine").resolve()
    assert {r.file for r in found.tensors.values()} == {"x.safetensors", "deeper/y.safetensors"}
    assert read(found)["b"] == raw(torch.full((2, 3), 98.0))


def test_a_key_in_two_files_is_refused(tmp_path):
    saved(tmp_path / "one.safetensors", "a", "b")
    saved(tmp_path / "two.safetensors", "b", "c")
    assert refusal(find, tmp_path) == (
        f"weights {tmp_path}: 'b' is in one.safetensors and in two.safetensors; keep one of them"
    )


def test_a_folder_without_weights_is_refused(tmp_path):
    (tmp_path / "flax_model.msgpack").write_bytes(b"flax")
    text = refusal(find, tmp_path)
    there = "holds no .safetensors file, and no .bin, but flax_model.msgpack"
    assert text == f"weights {tmp_path}: {there}; give the folder that does"


@pytest.mark.parametrize("name", ["gone", "gone.safetensors"])
def test_a_missing_folder_or_file_is_refused(tmp_path, name):
    assert refusal(find, tmp_path / name).startswith(f"weights {tmp_path / name}: no such file or folder; give ")


def test_a_link_to_nothing_is_refused(tmp_path):
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blob")
    text = refusal(find, tmp_path)
    assert text.startswith(f"weights {tmp_path / 'model.safetensors'}: No such file or directory (")
    assert str(tmp_path / "blob") in text


def test_a_folder_with_the_name_of_a_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    assert refusal(find, tmp_path).startswith(f"weights {tmp_path / 'model.safetensors'}: Is a directory")


def with_header(header: bytes, data: bytes = bytes(24)) -> bytes:
    return struct.pack("<Q", len(header)) + header + data


BROKEN = {
    "empty": b"",
    "too short for its length": b"\1\0\0",
    "a header longer than the file": struct.pack("<Q", 1000) + b"{}",
    "a pickle": b"\x80\x02}q\x00." * 20,
    "not JSON": with_header(b"{'a': 1}"),
    "not UTF-8": with_header(b'{"\xff": 1}'),
    "JSON but no object": with_header(b"[1, 2, 3]"),
    "an entry without offsets": with_header(b'{"a": {"dtype": "F32", "shape": [2, 3]}}'),
    "an unknown type": with_header(json.dumps({"a": {"dtype": "Q4", "shape": [6], "data_offsets": [0, 24]}}).encode()),
    "offsets past the end": with_header(
        json.dumps({"a": {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}}).encode()
    ),
    "offsets that do not fit the shape": with_header(
        json.dumps({"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 24]}}).encode()
    ),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_header_is_refused(tmp_path, content):
    saved(tmp_path / "good.safetensors", "z")
    (tmp_path / "model.safetensors").write_bytes(content)
    text = refusal(find, tmp_path)
    assert text.startswith(f"{tmp_path / 'model.safetensors'}: ")
    assert text.endswith("; copy it again")


@pytest.fixture(scope="module")
def wanted() -> dict[str, dict[str, tuple[int, ...]]]:
    """What the components of the tiny preset need, less the vision model's mask token, which has no effect."""
    networks = {name: network_on_meta(source) for name, source in components_of("hitoksr").items()}
    return {
        component: {n: tuple(p.shape) for n, p in network.named_parameters() if not n.endswith("mask_token")}
        for component, network in networks.items()
    }


def weights_file(path: Path, shapes: dict[str, tuple[int, ...]]) -> Tensors:
    path.parent.mkdir(parents=True, exist_ok=True)
    random_weights(shapes, 3, path)
    return find(path.parent)


def own_keys(wanted) -> dict[str, tuple[int, ...]]:
    return {HITOKSR.keys(c, name)[0]: shape for c, shapes in wanted.items() for name, shape in shapes.items()}


def test_the_systems_own_names_are_those_of_the_specification(wanted):
    names = own_keys(wanted)
    assert {name.split(".")[0] for name in names} == {"generator", "decoder", "quantizer", "vfm"}
    assert "quantizer.codebook" in names
    assert len(names) == sum(map(len, wanted.values()))  # no two parameters share one


SPELLINGS = {
    "as transformers 5 spells it": lambda key: key,
    "as published": lambda key: key.replace("vfm.model.layer.", "vfm.layer."),
    "as transformers 5 spells it, without prefix": lambda key: key.removeprefix("vfm."),
    "as published, without prefix": lambda key: key.replace("vfm.model.layer.", "layer.").removeprefix("vfm."),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_of_the_vision_models_keys_is_found(tmp_path, wanted, spell):
    own = own_keys(wanted)
    found = weights_file(tmp_path / "w.safetensors", {spell(key): shape for key, shape in own.items()})
    assert len(found.tensors) == len(own)
    references = reference_parameters(wanted, {"hitoksr": found}, HITOKSR)
    for component, shapes in wanted.items():
        assert references[component].keys() == shapes.keys()
        for name, shape in shapes.items():
            lies = found.tensors[spell(HITOKSR.keys(component, name)[0])]
            assert references[component][name] == replace(lies, folder="hitoksr")
            assert references[component][name].shape == shape


def test_a_file_of_the_published_names_is_found_beside_the_systems_own(tmp_path, wanted):
    """The vision model as its makers publish it and the rest as one file; the mask token comes along unread."""
    own = own_keys(wanted)
    public = {"embeddings.mask_token": (1, 1, 32)}
    for key, shape in own.items():
        if key.startswith("vfm."):
            public[key.removeprefix("vfm.").removeprefix("model.")] = shape
    assert {"layer.0.attention.q_proj.weight", "embeddings.register_tokens", "norm.weight"} <= public.keys()
    assert "layer.0.attention.k_proj.bias" not in public
    weights_file(tmp_path / "dinov3" / "model.safetensors", public)
    found = weights_file(tmp_path / "own.safetensors", {k: s for k, s in own.items() if not k.startswith("vfm.")})
    references = reference_parameters(wanted, {"hitoksr": found}, HITOKSR)
    assert {r.file for r in references["generate"].values()} == {"dinov3/model.safetensors", "own.safetensors"}
    assert {r.file for r in references["decode"].values()} == {"own.safetensors"}


def test_the_published_names_are_those_that_transformers_itself_saves_under(tmp_path):
    VisionPrior(HiTokConfig(**components_of("hitoksr")["generate"].arguments)).vfm.save_pretrained(tmp_path)
    found = find(tmp_path)
    assert {"layer.0.norm1.weight", "embeddings.cls_token", "norm.bias"} <= found.tensors.keys()
    network = network_on_meta(components_of("hitoksr")["generate"]).vision
    shapes = {f"vision.{n}": tuple(p.shape) for n, p in network.named_parameters() if not n.endswith("mask_token")}
    references = reference_parameters({"generate": shapes}, {"hitoksr": found}, HITOKSR)
    assert references["generate"].keys() == shapes.keys()


def test_what_serves_only_training_is_ignored(tmp_path, wanted):
    extra = {"encoder.embed.weight": (2, 2), "vfm.embeddings.mask_token": (1, 1, 32), "embeddings.mask_token": (1,)}
    found = weights_file(tmp_path / "w.safetensors", own_keys(wanted) | extra)
    references = reference_parameters(wanted, {"hitoksr": found}, HITOKSR)
    used = {(r.file, r.offset) for component in references.values() for r in component.values()}
    assert not used & {(found.tensors[key].file, found.tensors[key].offset) for key in extra}


@pytest.mark.parametrize(("count", "ending"), [(1, ";"), (3, ";"), (4, ", ...;"), (9, ", ...;")])
def test_missing_keys_are_counted_and_the_first_three_named(tmp_path, wanted, count, ending):
    own = own_keys(wanted)
    dropped = sorted(own)[10 : 10 + count]
    found = weights_file(tmp_path / "w.safetensors", {k: s for k, s in own.items() if k not in dropped})
    text = refusal(reference_parameters, wanted, {"hitoksr": found}, HITOKSR)
    assert text.startswith(
        f"weights {tmp_path}/w.safetensors: lacks {count} tensors: {', '.join(dropped[:3])}{ending} give"
    )


@pytest.mark.parametrize(("count", "ending"), [(1, ";"), (4, ", ...;")])
def test_unexpected_keys_are_counted_and_the_first_three_named(tmp_path, wanted, count, ending):
    extra = [f"lora.{i}" for i in range(count)]
    found = weights_file(tmp_path / "w.safetensors", own_keys(wanted) | dict.fromkeys(extra, (2,)))
    text = refusal(reference_parameters, wanted, {"hitoksr": found}, HITOKSR)
    assert text.startswith(
        f"weights {tmp_path}/w.safetensors: holds unexpected {count} tensors: {', '.join(extra[:3])}{ending} give"
    )


def test_a_second_spelling_of_a_tensor_is_unexpected(tmp_path, wanted):
    extra = {"vfm.layer.0.norm1.weight": (32,)}
    found = weights_file(tmp_path / "w.safetensors", own_keys(wanted) | extra)
    assert "unexpected 1 tensors: vfm.layer.0.norm1.weight;" in refusal(
        reference_parameters, wanted, {"hitoksr": found}, HITOKSR
    )


@pytest.mark.parametrize("shape", [(4, 16, 3), (4, 2, 16), (16, 8), (4, 16, 2, 2)], ids=str)  # not [4, 16, 2]
def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path, wanted, shape):
    found = weights_file(tmp_path / "w.safetensors", own_keys(wanted) | {"quantizer.codebook": shape})
    assert refusal(reference_parameters, wanted, {"hitoksr": found}, HITOKSR) == (
        f"weights {tmp_path / 'w.safetensors'}: 'quantizer.codebook' has shape {list(shape)}, the network needs"
        " [4, 16, 2]; give files of one model"
    )


def test_the_weights_of_something_else_entirely_are_refused(tmp_path, wanted):
    saved(tmp_path / "unet.safetensors", "down_blocks.0.weight")
    lacking = len(own_keys(wanted))
    text = refusal(reference_parameters, wanted, {"hitoksr": find(tmp_path)}, HITOKSR)
    assert f"lacks {lacking} tensors: decoder.blocks.0." in text
    assert "; holds instead: down_blocks.0.weight; give " in text


def test_what_a_file_holds_in_the_place_of_what_it_lacks_is_named(tmp_path, wanted):
    own = own_keys(wanted)
    renamed = {f"module.{key}" if key.startswith("decoder.") else key: shape for key, shape in own.items()}
    text = refusal(
        reference_parameters, wanted, {"hitoksr": weights_file(tmp_path / "w.safetensors", renamed)}, HITOKSR
    )
    lacking = sorted(key for key in own if key.startswith("decoder."))
    assert f"lacks {len(lacking)} tensors: {', '.join(lacking[:3])}, ...; holds instead: module.{lacking[0]}, " in text


def test_two_components_may_read_one_tensor(tmp_path):
    saved(tmp_path / "w.safetensors", "shared")
    shapes = {"one": {"shared": (2, 3)}, "two": {"shared": (2, 3)}}
    plain = SimpleNamespace(
        origin_of=lambda component, name: "w", keys=lambda component, name: (name,), ignored=lambda origin, key: False
    )
    references = reference_parameters(shapes, {"w": find(tmp_path)}, plain)
    assert references["one"]["shared"] == references["two"]["shared"]


def test_random_weights_are_equal_bytes_on_repeat_whatever_the_order(tmp_path):
    shapes = {"a.weight": (4, 6), "a.bias": (4,), "conv.weight": (3, 2, 5, 5), "scale": ()}
    for name, ordered in (("1", shapes), ("2", shapes), ("3", dict(reversed(shapes.items())))):
        random_weights(ordered, 11, tmp_path / f"{name}.safetensors")
    one, two, three = ((tmp_path / f"{i}.safetensors").read_bytes() for i in (1, 2, 3))
    assert one == two == three
    # one machine and version of NumPy as good as another: what a seed gives is written here
    assert sha256_of_bytes(one) == "3404dce36113e5b9ca75a4ed759511409639e3b774e242aa83095b176328aa41"


def test_random_weights_differ_by_seed_and_by_name_and_not_by_company(tmp_path):
    random_weights({"a": (64, 64), "b": (64, 64)}, 0, tmp_path / "0")
    random_weights({"a": (64, 64), "b": (64, 64)}, 1, tmp_path / "1")
    random_weights({"a": (64, 64), "c": (2, 2)}, 0, tmp_path / "alone")
    zero, one, alone = (load_file(tmp_path / name) for name in ("0", "1", "alone"))
    assert not (zero["a"] == one["a"]).any()
    assert not (zero["a"] == zero["b"]).any()
    assert torch.equal(zero["a"], alone["a"])


def test_random_weights_keep_activations_of_order_one(tmp_path):
    shapes = {"l.weight": (512, 300), "c.weight": (64, 32, 3, 3), "book": (4, 16, 256), "n.weight": (900,)}
    random_weights(shapes | {"n.bias": (900,)}, 0, tmp_path / "w.safetensors")
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        made = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        assert "seed 0" in file.metadata()["note"]
    assert {name: array.shape for name, array in made.items()} == shapes | {"n.bias": (900,)}
    assert all(array.dtype == np.float32 for array in made.values())
    # a standard deviation over n values is known to 1 / sqrt(2 n), at worst 2.4 % here; four of those
    fan_in = {"l.weight": 300, "c.weight": 32 * 9, "book": 256}
    for name, fan in fan_in.items():
        assert np.std(made[name]) * fan**0.5 == pytest.approx(1, abs=0.1)
    assert np.mean(made["n.weight"]) == pytest.approx(1, abs=0.01)
    assert np.mean(made["n.bias"]) == pytest.approx(0, abs=0.01)
    assert np.std(made["n.weight"]) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_that_does_not_fit_is_refused_and_leaves_no_file(tmp_path, seed):
    with pytest.raises(UsageError, match=rf"--random-weights {seed} does not fit in 32 bits; use a number from 0 to"):
        random_weights({"a": (2,)}, seed, tmp_path / "w.safetensors")
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=40)
@given(tensors, st.integers(0, 2**31), st.data())
def test_copies_hold_just_the_touched_tensors_with_their_bytes(specs, seed, data):
    made = drawn(specs, seed)
    touched = data.draw(st.lists(st.sampled_from(sorted(made)), min_size=1, unique=True))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file(made, folder / "all.safetensors")
        found = find(folder / "all.safetensors")
        moved = copy_tensors(found.folder, {n: found.tensors[n] for n in touched}, folder / "new" / "few.safetensors")
        theirs = load_file(folder / "new" / "few.safetensors")
        assert theirs.keys() == moved.keys() == set(touched)
        for n in touched:
            assert theirs[n].dtype == made[n].dtype
            assert theirs[n].shape == made[n].shape
            assert raw(theirs[n]) == raw(made[n]) == bytes(open_reference(folder / "new", moved[n]))
            assert moved[n] == find(folder / "new").tensors[n]


def test_copies_gather_tensors_of_several_files(tmp_path):
    saved(tmp_path / "w" / "one.safetensors", "a", "b")
    saved(tmp_path / "w" / "deeper" / "two.safetensors", "c")
    found = find(tmp_path / "w")
    moved = copy_tensors(found.folder, {n: found.tensors[n] for n in ("c", "a")}, tmp_path / "few.safetensors")
    assert {n: bytes(open_reference(tmp_path, r)) for n, r in moved.items()} == {n: read(found)[n] for n in ("a", "c")}
    assert {r.file for r in moved.values()} == {"few.safetensors"}


def test_copies_are_equal_bytes_whatever_the_order(tmp_path):
    found = find(saved(tmp_path / "all.safetensors", "a", "b", "c"))
    copy_tensors(found.folder, found.tensors, tmp_path / "one" / "w.safetensors")
    copy_tensors(found.folder, dict(reversed(found.tensors.items())), tmp_path / "two" / "w.safetensors")
    assert (tmp_path / "one" / "w.safetensors").read_bytes() == (tmp_path / "two" / "w.safetensors").read_bytes()


@pytest.mark.parametrize("before", [None, b"an earlier file"], ids=["no file yet", "over an earlier file"])
@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_copy_leaves_no_partial_file(tmp_path, monkeypatch, before, interruption):
    saved(tmp_path / "w" / "all.safetensors", "a", "b", "c")
    found = find(tmp_path / "w")
    target = tmp_path / "new" / "few.safetensors"
    if before:
        target.parent.mkdir()
        target.write_bytes(before)
    seen = []

    def interrupted(folder: Path, reference: Reference) -> np.ndarray:
        seen.append(sorted(path.name for path in target.parent.iterdir()))
        if len(seen) == 2:  # one tensor is written, two are not
            raise interruption
        return open_reference(folder, reference)

    monkeypatch.setattr(files, "open_reference", interrupted)
    with pytest.raises(interruption):
        copy_tensors(found.folder, found.tensors, target)
    assert len(seen) == 2
    assert len(seen[1]) == 1 + bool(before)  # it was under way
    assert [path.read_bytes() for path in target.parent.iterdir()] == ([before] if before else [])


def test_mapped_bytes_cannot_be_written_through(tmp_path):
    found = find(saved(tmp_path / "w.safetensors", "a"))
    mapped = open_reference(found.folder, found.tensors["a"])
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1


def sharded(folder: Path, *, named: tuple[str, ...] = ("one.safetensors", "two.safetensors")) -> Path:
    """Two shards, an index that names some of them, and a variant of the same weights beside."""
    saved(folder / "one.safetensors", "a")
    saved(folder / "two.safetensors", "b")
    saved(folder / "model.fp16.safetensors", "a", "b")
    index = {"weight_map": {f"key {i}": name for i, name in enumerate(named)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_an_index_says_which_of_the_files_are_the_shards(tmp_path):
    found = find(sharded(tmp_path))
    assert {key: r.file for key, r in found.tensors.items()} == {"a": "one.safetensors", "b": "two.safetensors"}


def test_a_shard_that_the_index_names_and_nobody_has_is_named(tmp_path):
    folder = sharded(tmp_path, named=("one.safetensors", "gone.safetensors"))
    text = refusal(find, folder)
    assert "'gone.safetensors', which is not there" in text and str(folder / "model.safetensors.index.json") in text


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_cannot_be_read_is_refused(tmp_path, text):
    folder = sharded(tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "unreadable index" in refusal(find, folder)


def test_rows_of_a_fused_tensor_are_a_byte_range_of_it(tmp_path):
    fused = torch.arange(24, dtype=torch.float32).reshape(6, 4)
    save_file({"qkv": fused, "other": torch.zeros(3)}, tmp_path / "w.safetensors")
    found = find(tmp_path)
    for start, stop, parts in [(0, 1, 3), (1, 2, 3), (2, 3, 3), (1, 3, 3), (1, 2, 2)]:
        part = resolve(found, ("absent", Rows("qkv", start, stop, parts)))
        assert part is not None
        rows = slice(6 * start // parts, 6 * stop // parts)
        assert np.array_equal(open_reference(tmp_path, part).view(np.float32).reshape(part.shape), fused[rows].numpy())
    assert resolve(found, ("absent", Rows("gone", 0, 1, 2))) is None


def test_weights_that_lie_nowhere_are_refused_by_what_they_are(tmp_path):
    origin = Origin("weights", ("transformer", "one.safetensors"), "the backbone")
    saved(tmp_path / "model" / "one.safetensors", "a")
    assert locate(origin, {"weights": tmp_path / "model"}, required=True) == tmp_path / "model" / "one.safetensors"
    assert locate(origin, {"weights": tmp_path}, required=True) == tmp_path / "model" / "one.safetensors"
    assert locate(origin, {}, required=False) is None
    assert "the backbone is not given; give --weights" in refusal(locate, origin, {}, required=True)
    (tmp_path / "empty").mkdir()
    text = refusal(locate, origin, {"weights": tmp_path / "empty"}, required=True)
    assert text.startswith("the backbone: none of ") and f"is there, {tmp_path / 'empty'} holds nothing; give" in text
    (tmp_path / "empty" / "unet").mkdir()
    saved(tmp_path / "empty" / "model.safetensors", "a")
    text = refusal(locate, origin, {"weights": tmp_path / "empty"}, required=True)
    assert f"{tmp_path / 'empty'} holds model.safetensors, unet/; give --weights PATH" in text
