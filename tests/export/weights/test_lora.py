"""LoRA files: what PEFT and diffusers themselves make of them, in every spelling, or one line why not."""

import json
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from tilewright.export.weights.files import converted, find
from tilewright.export.weights.lora import Adapter, merge, read
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError

NEEDED = "the package whose files are read"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
METADATA = "lora_adapter_metadata"


def refusal(act, *arguments) -> str:
    """The one line that a wrong LoRA gets."""
    with pytest.raises(InputError) as caught:
        act(*arguments)
    assert caught.value.exit_code == 8
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def written(path: Path, tensors: dict[str, torch.Tensor], **metadata: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {name: json.dumps(value) for name, value in metadata.items()} | {"format": "pt"})
    return path


def pair(module: str, rank: int = 4, out: int = 6, width: int = 8, spelling: str = "lora_A lora_B") -> dict:
    """The tensors of one linear's adapter, each different."""
    down, up = spelling.split()
    generator = torch.Generator().manual_seed(sum(module.encode()))
    return {
        f"{module}.{down}.weight": torch.randn(rank, width, generator=generator),
        f"{module}.{up}.weight": torch.randn(out, rank, generator=generator),
    }


def tensor_of(folder: Path, reference: Reference) -> torch.Tensor:
    data = bytearray((folder / reference.file).read_bytes()[reference.offset :][: reference.length])
    return torch.frombuffer(data, dtype=DTYPES[reference.dtype]).reshape(reference.shape)


def merged(base: Path, lora: Path, prefixes=("transformer.",), default_alpha=None, strength=1.0) -> dict:
    """Every weight of the base file with the LoRA file in it, and the names of those that it is in."""
    weights, found = find(base), find(lora)
    adapters, rest = read(found, prefixes, default_alpha)
    assert not rest
    result = {name: tensor_of(weights.folder, reference) for name, reference in weights.tensors.items()}
    for module, adapter in adapters.items():
        name = f"{module}.weight"
        data = merge(weights.folder, weights.tensors[name], found.folder, adapter, strength)
        result[name] = torch.frombuffer(bytearray(data), dtype=result[name].dtype).reshape(result[name].shape)
    return result


class Small(nn.Module):
    """Linears and convolutions, some of whose names end alike."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 12)
        self.block = nn.ModuleDict({"proj": nn.Linear(12, 10, bias=False), "left": nn.Linear(10, 4)})
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.point = nn.Conv2d(6, 5, 1)
        self.line = nn.Conv1d(3, 7, 5)


ADAPTED = ["proj", "conv", "point", "line"]
CONFIGS = {
    "alpha is the rank": {"r": 4, "lora_alpha": 4},
    "alpha is not the rank": {"r": 4, "lora_alpha": 10},
    "an alpha and a rank per module": {
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {"point": 2, "block.proj": 3},
        "alpha_pattern": {"conv": 1, "^proj": 16, r"bl\w+\.proj": 7},
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
}


def peft_model(**config):
    peft = pytest.importorskip("peft", reason=NEEDED)
    torch.manual_seed(0)
    return peft.get_peft_model(Small(), peft.LoraConfig(target_modules=ADAPTED, init_lora_weights=False, **config))


def assert_close(ours: dict, theirs: dict, base: dict, adapted: int) -> None:
    """Equal to a few float32 roundings, and changed in just as many places as were adapted."""
    assert ours.keys() == theirs.keys() == base.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)
    changed = [name for name in ours if not torch.equal(ours[name], base[name])]
    assert len(changed) == adapted
    assert all((ours[name] - base[name]).abs().mean() > 1e-3 for name in changed)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_folder_that_peft_saved_merges_as_peft_merges(tmp_path, config):
    model = peft_model(**config)
    torch.manual_seed(0)
    base = Small().state_dict()
    save_file(base, tmp_path / "base.safetensors")
    model.save_pretrained(tmp_path / "lora")
    ours = merged(tmp_path / "base.safetensors", tmp_path / "lora")
    assert_close(ours, model.merge_and_unload().state_dict(), base, 5)


def test_a_state_dict_of_peft_with_the_adapters_name_in_its_keys_is_read(tmp_path):
    model = peft_model(r=4, lora_alpha=4)
    live = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert "base_model.model.proj.lora_A.default.weight" in live
    save_file(live, tmp_path / "live.safetensors")
    model.save_pretrained(tmp_path / "saved")
    named, unnamed = (find(tmp_path / name) for name in ("live.safetensors", "saved"))
    adapters = read(named)[0]
    assert set(adapters) == {"proj", "block.proj", "conv", "point", "line"}
    for module, other in read(unnamed)[0].items():
        for role in ("down", "up"):
            one = tensor_of(named.folder, getattr(adapters[module], role))
            assert torch.equal(one, tensor_of(unnamed.folder, getattr(other, role)))


@pytest.mark.filterwarnings("ignore:Adapter 'default'.* invalid shape")  # PEFT, of the biases that it saves itself
def test_what_peft_adds_for_dora_biases_and_embeddings_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason=NEEDED)
    for name, config, what in (
        ("dora", {"use_dora": True}, "DoRA (magnitude vectors): base_model.model.block.proj.lora_magnitude_vector"),
        ("bias", {"lora_bias": True}, "biases of LoRA: base_model.model.proj.lora_B.bias"),
    ):
        target = r"block\.proj|proj" if name == "dora" else r"^proj$"  # a linear without bias can have none adapted
        model = peft.get_peft_model(Small(), peft.LoraConfig(r=4, target_modules=target, **config))
        model.save_pretrained(tmp_path / name)
        text = refusal(read, find(tmp_path / name))
        assert text.startswith(f"LoRA {tmp_path / name / 'adapter_model.safetensors'}: holds {what}")
        assert text.endswith("; not supported, train or export it without")
    words = nn.Sequential(nn.Embedding(5, 8))
    peft.get_peft_model(words, peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path / "words")
    assert "in a style that is not read: base_model.model.0.lora_embedding_A" in refusal(read, find(tmp_path / "words"))


TINY = {
    "in_channels": 48,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
FLUX_TARGETS = ["x_embedder", "proj_out", "to_q", "to_out.0", "net.0.proj", "norm.linear"]


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """The tiny transformer with an adapter, its base weights and its LoRA as diffusers writes it in three ways."""
    peft = pytest.importorskip("peft", reason=NEEDED)
    diffusers = pytest.importorskip("diffusers", reason=NEEDED)
    from peft.utils import get_peft_model_state_dict

    folder = tmp_path_factory.mktemp("flux")
    torch.manual_seed(1)
    transformer = diffusers.FluxTransformer2DModel(**TINY)
    transformer.save_pretrained(folder / "base")
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        rank_pattern={"to_q": 2},
        alpha_pattern={"^proj_out": 1, "to_q": 5, r"single_transformer_blocks\.1\.proj_out": 3},
        target_modules=FLUX_TARGETS,
        init_lora_weights=False,
    )
    transformer.add_adapter(config)
    layers = get_peft_model_state_dict(transformer)
    notes = transformer.peft_config["default"].to_dict()
    save = diffusers.FluxPipeline.save_lora_weights
    save(folder / "noted", layers, transformer_lora_adapter_metadata=notes)
    save(folder / "silent", layers)
    transformer.save_lora_adapter(folder / "bare")
    return folder


@pytest.mark.parametrize("way", ["noted", "silent", "bare"])
def test_files_that_diffusers_wrote_merge_as_diffusers_fuses_them(flux, way):
    import diffusers

    fused = diffusers.FluxTransformer2DModel.from_pretrained(flux / "base")
    fused.load_lora_adapter(flux / way, prefix=None if way == "bare" else "transformer", use_safetensors=True)
    fused.fuse_lora(lora_scale=0.75)
    theirs = {
        name.replace(".base_layer.", "."): tensor for name, tensor in fused.state_dict().items() if "lora_" not in name
    }
    ours = merged(flux / "base", flux / way, strength=0.75)
    base = load_file(flux / "base" / "diffusion_pytorch_model.safetensors")
    count = sum("lora_A" in name for name in load_file(flux / way / "pytorch_lora_weights.safetensors"))
    assert count == 16
    assert_close(ours, theirs, base, count)


def test_notes_of_diffusers_change_the_scale_and_without_them_it_is_one(flux):
    noted, silent = (read(find(flux / way))[0] for way in ("noted", "silent"))
    assert {adapter.scale for adapter in silent.values()} == {1.0}
    assert noted["proj_out"].scale == 1 / 4
    assert noted["single_transformer_blocks.1.proj_out"].scale == 3 / 4
    assert noted["single_transformer_blocks.0.proj_out"].scale == 6 / 4
    assert noted["transformer_blocks.0.attn.to_q"].scale == 5 / 2
    assert noted["transformer_blocks.0.attn.to_q"].rank == 2


PAIRS = {
    "diffusers and PEFT": "lora_A lora_B",
    "with the adapter's name": "lora_A.default lora_B.default",
    "old diffusers": "lora.down lora.up",
    "underscores": "lora_down lora_up",
}
PREFIXES = {
    "diffusers": "transformer.",
    "PEFT": "base_model.model.",
    "PEFT around a pipeline": "base_model.model.transformer.",
    "bare": "",
}
MODULES = ("x_embedder", "transformer_blocks.0.attn.to_out.0")


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("spelling", PAIRS.values(), ids=PAIRS)
def test_every_spelling_is_read(tmp_path, spelling, prefix):
    plain = {m: pair(m) for m in MODULES}
    spelt = {m: [f"{prefix}{m}.{role}.weight" for role in spelling.split()] for m in MODULES}
    tensors = {new: plain[m][old] for m in MODULES for new, old in zip(spelt[m], plain[m], strict=True)}
    found = find(written(tmp_path / "lora.safetensors", tensors))
    adapters, rest = read(found)
    assert rest == set()
    assert adapters == {m: Adapter(found.tensors[spelt[m][0]], found.tensors[spelt[m][1]], 1.0) for m in MODULES}
    assert {(a.rank, a.shape) for a in adapters.values()} == {(4, (6, 8))}


def test_one_file_may_mix_spellings_and_prefixes_may_be_others(tmp_path):
    """As InstantIR's previewer does."""
    attention, conv = "unet.mid_block.attentions.0.to_q", "unet.conv_in"
    tensors = pair(attention, spelling="lora.down lora.up") | {
        f"{conv}.lora_A.weight": torch.zeros(4, 2, 3, 3),
        f"{conv}.lora_B.weight": torch.zeros(5, 4, 1, 1),
    }
    found = find(written(tmp_path / "lora.safetensors", tensors))
    adapters, _ = read(found, ("unet.",), 1.0)
    assert {m: (a.scale, a.shape) for m, a in adapters.items()} == {
        "mid_block.attentions.0.to_q": (1 / 4, (6, 8)),
        "conv_in": (1 / 4, (5, 2, 3, 3)),
    }
    assert set(read(found)[0]) == {attention, conv}
    assert set(read(found, ("transformer.", "unet."))[0]) == set(adapters)


def test_other_keys_are_given_back(tmp_path):
    other = {n: torch.zeros(2) for n in ("vcb.fc1.weight", "vcb.exploration.weight", "vcb.alpha", "flora.bias")}
    found = find(written(tmp_path / "lora.safetensors", pair("transformer.a") | other))
    adapters, rest = read(found)
    assert set(adapters) == {"a"}
    assert rest == set(other)


ALPHAS = ["m.alpha", "m.lora.alpha", "m.lora_A.alpha", "m.lora_A.default.alpha", "m.lora.down.alpha", "m.lora_up.alpha"]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("key", ALPHAS)
def test_every_spelling_of_alpha_is_read(tmp_path, key, prefix):
    tensors = pair(f"{prefix}m") | pair("other") | {f"{prefix}{key}": torch.tensor(10.0)}
    adapters, rest = read(find(written(tmp_path / "lora.safetensors", tensors)))
    assert rest == set()
    assert {m: a.scale for m, a in adapters.items()} == {"m": 2.5, "other": 1.0}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_alpha_may_be_of_any_float_type(tmp_path, dtype, shape):
    tensors = pair("m") | {"m.alpha": torch.full(shape, 1.5).to(dtype)}
    assert read(find(written(tmp_path / "lora.safetensors", tensors)))[0]["m"].scale == 1.5 / 4


NOTE = {"lora_alpha": 6, "r": 4, "alpha_pattern": {"n": 2}}
PREFIXED = {f"transformer.{name}": value for name, value in NOTE.items()} | {"text_encoder.lora_alpha": 100}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_the_alphas_of_a_pickle_are_read_before_it_is_converted(tmp_path, monkeypatch, legacy):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    tensors = pair("m") | pair("n")
    for module, alpha in (("m", 8.0), ("n", 2.0)):
        tensors[f"{module}.alpha"] = torch.tensor([0.0, alpha], dtype=torch.bfloat16)[1]  # not first in its storage
    torch.save(tensors, tmp_path / "lora.bin", _use_new_zipfile_serialization=not legacy)
    found = find(tmp_path / "lora.bin")
    listed, _ = read(found)
    assert not (tmp_path / "cache" / "converted").exists()
    made, _ = read(converted(found))
    assert {m: a.scale for m, a in listed.items()} == {m: a.scale for m, a in made.items()} == {"m": 2.0, "n": 0.5}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12}))
    torch.save(pair("m"), tmp_path / "lora.bin", _use_new_zipfile_serialization=not legacy)
    assert read(find(tmp_path / "lora.bin"))[0]["m"].scale == 3.0


def test_alpha_is_the_tensors_then_the_headers_then_the_configs_then_the_default_then_the_rank(tmp_path):
    tensors = pair("transformer.m") | pair("transformer.n") | pair("transformer.o")
    alpha = {"transformer.o.alpha": torch.tensor(3.0)}

    def scales(name: str, default=None) -> list[float]:
        adapters, _ = read(find(tmp_path / name), default_alpha=default)
        return [4 * adapters[module].scale for module in "mno"]

    written(tmp_path / "header" / "a.safetensors", tensors | alpha, **{METADATA: PREFIXED})
    written(tmp_path / "both" / "a.safetensors", tensors | alpha, **{METADATA: PREFIXED})
    written(tmp_path / "config" / "a.safetensors", tensors | alpha)
    written(tmp_path / "none" / "a.safetensors", tensors | alpha)
    written(tmp_path / "other" / "a.safetensors", tensors | alpha, **{METADATA: {"text_encoder.lora_alpha": 100}})
    (tmp_path / "both" / "adapter_config.json").write_text(json.dumps({"lora_alpha": 50}))
    (tmp_path / "config" / "adapter_config.json").write_text(json.dumps(NOTE))
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({"peft_type": "LOHA", "alpha": 8}))
    for name in ("header", "both", "config"):
        assert scales(name) == scales(name, 1.0) == [6, 2, 3]
    for name in ("none", "other"):
        assert scales(name) == [4, 4, 3]
        assert scales(name, 1.0) == [1, 1, 3]


def test_a_rank_stabilised_scale_is_of_the_note_and_not_of_a_tensor(tmp_path):
    tensors = pair("m") | pair("n") | {"m.alpha": torch.tensor(6.0)}
    lora = written(tmp_path / "a.safetensors", tensors, **{METADATA: {"lora_alpha": 6, "use_rslora": True}})
    assert {m: a.scale for m, a in read(find(lora))[0].items()} == {"m": 1.5, "n": 3.0}


def test_the_config_is_found_beside_the_link_and_not_beside_the_blob(tmp_path):
    """As a download cache lays them out."""
    blob = written(tmp_path / "blobs" / "0123", pair("base_model.model.m"))
    snapshot = tmp_path / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(blob)
    (snapshot / "adapter_config.json").write_text(json.dumps(NOTE))
    (blob.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 50}))
    assert read(find(snapshot))[0]["m"].scale == 1.5


words = st.text("abcdefgh_0123", min_size=1, max_size=8).filter(lambda word: not word.startswith("lora_"))
paths = st.lists(words, min_size=1, max_size=4).map(".".join)


@settings(deadline=None, max_examples=40)
@given(
    st.dictionaries(paths, st.sampled_from(sorted(PAIRS.values())), min_size=1, max_size=6),
    st.sampled_from(sorted(PREFIXES.values())),
    st.sets(paths.map("vcb.{}.bias".format), max_size=3),
)
def test_every_module_gets_its_own_pair_whatever_its_path(modules, prefix, others):
    tensors = {k: t for m, spelling in modules.items() for k, t in pair(f"{prefix}{m}", spelling=spelling).items()}
    with tempfile.TemporaryDirectory() as folder:
        found = find(written(Path(folder) / "a.safetensors", tensors | {key: torch.zeros(1) for key in others}))
        adapters, rest = read(found)
        assert adapters.keys() == modules.keys()
        assert rest == others
        for module, spelling in modules.items():
            own = pair(f"{prefix}{module}", spelling=spelling).values()
            references = (adapters[module].down, adapters[module].up)
            for tensor, reference in zip(own, references, strict=True):
                assert torch.equal(tensor, tensor_of(found.folder, reference))


sizes = st.integers(1, 6)


@settings(deadline=None, max_examples=60)
@given(
    st.tuples(sizes, sizes, sizes),
    st.sampled_from([(), (1, 1), (3, 3), (2,), (2, 1, 3)]),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([0.0, 0.25, 1.0, -2.0]),
    st.integers(0, 2**31),
)
def test_a_merge_is_rounded_once(dimensions, kernel, base_dtype, dtype, strength, seed):
    """All values are multiples of 2**-9 below 2**12, so that only the last rounding can lose anything."""
    rank, out, width = dimensions
    generator = torch.Generator().manual_seed(seed)

    def drawn(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(-high, high + 1, shape, generator=generator).double()

    base = (drawn(2**10, out, width, *kernel) / 2**7).to(DTYPES[base_dtype])
    down, up = drawn(8, rank, width, *kernel), drawn(8, out, rank, *(1 for _ in kernel))
    exact = base.double() + strength * 0.5 * torch.einsum("or,r...->o...", up.flatten(1), down)
    with tempfile.TemporaryDirectory() as name:
        weights = find(written(Path(name) / "base.safetensors", {"pad": torch.zeros(1), "m.weight": base}))
        lora = {"m.lora_A.weight": down.to(DTYPES[dtype]), "m.lora_B.weight": up.to(DTYPES[dtype])}
        file = written(Path(name) / "lora.safetensors", lora | {"m.alpha": torch.tensor(rank / 2)})
        before = (Path(name) / "base.safetensors").read_bytes()
        found = find(file)
        (adapter,) = read(found)[0].values()
        data = merge(weights.folder, weights.tensors["m.weight"], found.folder, adapter, strength)
        assert data == exact.to(base.dtype).view(torch.uint8).numpy().tobytes()
        assert (Path(name) / "base.safetensors").read_bytes() == before


def test_a_merge_into_bfloat16_goes_to_the_nearest_and_to_even_halfway(tmp_path):
    """The spacing above 256 is 2: adding 1 is halfway."""
    base = torch.tensor([[256.0], [258.0], [256.0], [-258.0]], dtype=torch.bfloat16)
    lora = {"m.lora_A.weight": torch.ones(1, 1), "m.lora_B.weight": torch.tensor([[1.0], [1.0], [1.001], [-1.0]])}
    find(written(tmp_path / "base.safetensors", {"m.weight": base}))
    written(tmp_path / "lora.safetensors", lora)
    ours = merged(tmp_path / "base.safetensors", tmp_path / "lora.safetensors")["m.weight"]
    assert ours.dtype == torch.bfloat16
    assert ours.flatten().tolist() == [256, 260, 258, -260]


def test_large_merges_are_as_exact_as_float32(tmp_path):
    generator = torch.Generator().manual_seed(3)
    base, down, up = (torch.randn(s, generator=generator) for s in ((96, 80), (64, 80), (96, 64)))
    written(tmp_path / "base.safetensors", {"m.weight": base})
    written(tmp_path / "lora.safetensors", {"m.lora_A.weight": down, "m.lora_B.weight": up})
    ours = merged(tmp_path / "base.safetensors", tmp_path / "lora.safetensors", default_alpha=1.0, strength=0.8)
    exact = base.double() + 0.8 / 64 * up.double() @ down.double()
    assert (ours["m.weight"] - exact).abs().max() < 2e-6
    assert (base - exact).abs().mean() > 0.05


def test_a_row_slice_of_a_fused_tensor_merges_on_its_own(tmp_path):
    fused = torch.randn(18, 8, generator=torch.Generator().manual_seed(4)).bfloat16()
    weights = find(written(tmp_path / "base.safetensors", {"qkv.weight": fused}))
    found = find(written(tmp_path / "lora.safetensors", pair("to_k")))
    whole = weights.tensors["qkv.weight"]
    rows = Reference(whole.file, whole.dtype, (6, 8), whole.offset + 6 * 8 * 2, 6 * 8 * 2)
    down, up = pair("to_k").values()
    expected = (fused[6:12].float() + up @ down).bfloat16()
    data = merge(weights.folder, rows, found.folder, read(found)[0]["to_k"], 1.0)
    assert torch.equal(torch.frombuffer(bytearray(data), dtype=torch.bfloat16).reshape(6, 8), expected)


def refused(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: object) -> str:
    """What is said of a file with these tensors, less the file."""
    lora = written(tmp_path / "my lora.safetensors", tensors, **metadata)
    text = refusal(read, find(lora))
    assert text.startswith(f"LoRA {lora}: ")
    return text.removeprefix(f"LoRA {lora}: ")


@pytest.mark.parametrize("spelling", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("missing", [0, 1], ids=["down", "up"])
def test_half_a_pair_is_refused(tmp_path, spelling, missing):
    tensors = pair("transformer.a") | pair("transformer.b", spelling=spelling)
    del tensors[f"transformer.b.{spelling.split()[missing]}.weight"]
    kept = f"transformer.b.{spelling.split()[1 - missing]}.weight"
    assert refused(tmp_path, tensors) == f"holds only one half of {kept}; copy or export it again"


def test_halves_beyond_three_are_not_named(tmp_path):
    tensors = {key: tensor for m in "edcba" for key, tensor in pair(m).items() if "_A" in key}
    named = ", ".join(f"{m}.lora_A.weight" for m in "abc")
    assert refused(tmp_path, tensors) == f"holds only one half of {named}, ...; copy or export it again"


@pytest.mark.parametrize(
    ("down", "up"),
    [
        ((4, 8), (6, 5)),
        ((8,), (6, 8)),
        ((4, 8), (6,)),
        ((), ()),
        ((4, 8, 3, 3), (6, 4)),
        ((4, 8), (6, 4, 1, 1)),
        ((4, 8, 3, 3), (6, 5, 1, 1)),
        ((4, 8, 1, 1), (6, 4, 3, 3)),
    ],
    ids=str,
)
def test_shapes_that_are_no_pair_are_refused(tmp_path, down, up):
    tensors = {"transformer.m.lora_A.weight": torch.zeros(down), "transformer.m.lora_B.weight": torch.zeros(up)}
    assert refused(tmp_path, tensors) == (
        f"'transformer.m.lora_A.weight' {list(down)} and 'transformer.m.lora_B.weight' {list(up)} are no pair"
        " [rank, in, ...] and [out, rank, 1...] of one rank above 0; export it again"
    )


def test_rank_zero_is_refused(tmp_path):
    """By the header's reader or here; what an empty shard saves."""
    lora = written(tmp_path / "lora.safetensors", pair("m", rank=0))
    text = refusal(lambda: read(find(lora)))
    assert str(lora) in text
    assert "[0, 8]" in text
    found = find(written(tmp_path / "other.safetensors", pair("m")))
    tensors = {key: replace(r, shape=tuple(0 if d == 4 else d for d in r.shape)) for key, r in found.tensors.items()}
    text = refusal(read, replace(found, tensors=tensors))
    assert "'m.lora_A.weight' [0, 8] and 'm.lora_B.weight' [6, 0] are no pair" in text
    assert text.endswith(" of one rank above 0; export it again")


KOHYA = "lora_unet_double_blocks_0_img_attn_qkv"


@pytest.mark.parametrize(
    "tensors",
    [
        pair(KOHYA, spelling="lora_down lora_up"),
        pair("m") | pair(KOHYA, spelling="lora_down lora_up"),
        {f"{KOHYA}.alpha": torch.tensor(1.0)},
        pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"),
        pair("transformer.a.attn.processor", spelling="to_q_lora.down to_q_lora.up"),
        {"m.lora_mid.weight": torch.zeros(4, 4)} | pair("m", spelling="lora_down lora_up"),
        {"m.lora_A.alpha": torch.tensor(1.0)},
        {"lora_A.weight": torch.zeros(4, 8)},
    ],
    ids=lambda tensors: min(tensors),
)
def test_other_styles_are_refused_and_those_that_are_read_are_named(tmp_path, tensors):
    text = refused(tmp_path, tensors)
    unread = [key for key in sorted(tensors) if key not in pair("m") | pair("m", spelling="lora_down lora_up")]
    assert text.startswith(f"holds LoRA keys in a style that is not read: {', '.join(unread)[:40]}")
    assert text.endswith(
        "read are <module.path>.lora_A/.lora_B.weight, .lora.down/.lora.up.weight and .lora_down/.lora_up.weight;"
        " load it in diffusers and save it with save_lora_weights"
    )


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("transformer.m.lora_magnitude_vector", "DoRA (magnitude vectors)"),
        ("base_model.model.m.lora_magnitude_vector.default.weight", "DoRA (magnitude vectors)"),
        (f"{KOHYA}.dora_scale", "DoRA (magnitude vectors)"),
        ("transformer.m.lora_B.bias", "biases of LoRA"),
        ("m.lora_B.default.bias", "biases of LoRA"),
        ("m.lora.up.bias", "biases of LoRA"),
    ],
)
def test_dora_and_biases_are_refused(tmp_path, key, what):
    text = refused(tmp_path, pair("transformer.m") | {key: torch.zeros(6)})
    assert text == f"holds {what}: {key}; not supported, train or export it without"


def test_a_file_without_lora_keys_is_refused(tmp_path):
    text = refused(tmp_path, {"vcb.fc1.weight": torch.zeros(2), "m.alpha": torch.zeros(1)})
    assert text == "holds no LoRA key; give the file with the lora_A and lora_B tensors"


@pytest.mark.parametrize(
    ("tensors", "both"),
    [
        (pair("transformer.m") | pair("m"), "m.lora_A.weight, transformer.m.lora_A.weight"),
        (pair("m") | pair("m", spelling="lora_A.x lora_B.x"), "m.lora_A.weight, m.lora_A.x.weight"),
        (pair("m") | {k: torch.zeros(1) for k in ("m.alpha", "m.lora_A.alpha")}, "m.alpha, m.lora_A.alpha"),
    ],
    ids=["two prefixes", "two adapters", "two alphas"],
)
def test_two_tensors_for_one_role_are_refused(tmp_path, tensors, both):
    assert refused(tmp_path, tensors) == f"holds both {both} for one module; keep one of them"


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_an_alpha_that_is_not_finite_is_refused_wherever_it_stands(tmp_path, value):
    expected = f"alpha of 'm' is {value}, not a finite number; export it again"
    assert refused(tmp_path, pair("transformer.m") | {"transformer.m.alpha": torch.tensor(float(value))}) == expected
    assert refused(tmp_path, pair("m"), **{METADATA: {"lora_alpha": float(value)}}) == expected


def test_an_alpha_of_several_numbers_is_refused(tmp_path):
    text = refused(tmp_path, pair("m") | {"m.alpha": torch.zeros(2)})
    assert text == "'m.alpha' has shape [2], not one number; export it again"


@pytest.mark.parametrize("role", ["lora_A", "lora_B"])
def test_a_pair_of_another_type_is_refused(tmp_path, role):
    tensors = pair("m")
    tensors[f"m.{role}.weight"] = tensors[f"m.{role}.weight"].to(torch.float8_e4m3fn)
    assert refused(tmp_path, tensors) == (
        f"'m.{role}.weight' is float8_e4m3fn, not one of float32, float16, bfloat16; convert it"
    )


BROKEN = {
    "not JSON": "{",
    "no object": "[1]",
    "a number": "1",
    "alpha is a word": '{"lora_alpha": "much"}',
    "alpha is null": '{"lora_alpha": null}',
    "alpha is beyond any float": f'{{"lora_alpha": 1{"0" * 400}}}',
    "patterns are a list": '{"lora_alpha": 1, "alpha_pattern": [1]}',
    "a pattern is no expression": '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}',
    "nested beyond measure": "[" * 200_000,
    "not UTF-8": b"\xff\xfe\xfa",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_broken_notes_are_refused(tmp_path, text):
    data = text if isinstance(text, bytes) else text.encode()
    lora = written(tmp_path / "adapter_model.safetensors", pair("m"))
    config = tmp_path / "adapter_config.json"
    config.write_bytes(data)
    said = refusal(read, find(lora))
    assert said.startswith(f"LoRA {config}: unreadable notes on alpha (")
    assert said.endswith("); export it again")


def test_broken_notes_in_the_header_are_refused(tmp_path):
    save_file(pair("m"), tmp_path / "a.safetensors", {METADATA: "{"})
    said = refusal(read, find(tmp_path / "a.safetensors"))
    assert said.startswith(f"LoRA {tmp_path / 'a.safetensors'}: unreadable notes on alpha (")


def merge_refusal(tmp_path: Path, base: torch.Tensor, strength: float = 1.0, scale: float = 1.0) -> str:
    weights = find(written(tmp_path / "base.safetensors", {"m.weight": base}))
    found = find(written(tmp_path / "lora.safetensors", pair("m")))
    adapter = read(found, default_alpha=4 * scale)[0]["m"]
    return refusal(merge, weights.folder, weights.tensors["m.weight"], found.folder, adapter, strength)


def test_a_base_of_another_type_or_shape_takes_no_merge(tmp_path):
    assert merge_refusal(tmp_path, torch.zeros(6, 8).to(torch.float8_e4m3fn)) == (
        f"weights {tmp_path / 'base.safetensors'}: float8_e4m3fn takes no LoRA;"
        " give them in one of float32, float16, bfloat16"
    )
    for shape in ((8, 6), (6, 1), (6, 8, 1, 1)):
        assert merge_refusal(tmp_path, torch.zeros(shape)) == (
            f"LoRA {tmp_path / 'lora.safetensors'}: a pair for [6, 8] does not fit {list(shape)} of"
            f" {tmp_path / 'base.safetensors'}; is this the LoRA of this system and size?"
        )


@pytest.mark.parametrize(
    ("dtype", "strength", "scale"),
    [("float16", 1e6, 1.0), ("float16", 1.0, 1e6), ("bfloat16", 1e39, 1.0), ("float32", float("nan"), 1.0)],
)
def test_a_merge_that_is_not_finite_is_refused(tmp_path, dtype, strength, scale):
    assert merge_refusal(tmp_path, torch.ones(6, 8, dtype=DTYPES[dtype]), strength, scale) == (
        f"LoRA {tmp_path / 'lora.safetensors'}: at strength {strength} {dtype} weights are not finite; lower it"
    )
