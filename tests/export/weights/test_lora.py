"""LoRA files: what PEFT and diffusers themselves make of them, in every spelling."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from support.lora import METADATA, NEEDED, PAIRS, assert_close, merged, pair, refusal, tensor_of, written
from tilewright.export.weights.files import converted, find
from tilewright.export.weights.lora import Adapter, read_adapters


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
    adapters = read_adapters(named)[0]
    assert set(adapters) == {"proj", "block.proj", "conv", "point", "line"}
    for module, other in read_adapters(unnamed)[0].items():
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
        text = refusal(read_adapters, find(tmp_path / name))
        assert text.startswith(f"LoRA {tmp_path / name / 'adapter_model.safetensors'}: holds {what}")
        assert text.endswith("; not supported, train or export it without")
    words = nn.Sequential(nn.Embedding(5, 8))
    peft.get_peft_model(words, peft.LoraConfig(r=4, target_modules=["0"])).save_pretrained(tmp_path / "words")
    assert "of an unknown style: base_model.model.0.lora_embedding_A" in refusal(
        read_adapters, find(tmp_path / "words")
    )


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
    noted, silent = (read_adapters(find(flux / way))[0] for way in ("noted", "silent"))
    assert {adapter.scale for adapter in silent.values()} == {1.0}
    assert noted["proj_out"].scale == 1 / 4
    assert noted["single_transformer_blocks.1.proj_out"].scale == 3 / 4
    assert noted["single_transformer_blocks.0.proj_out"].scale == 6 / 4
    assert noted["transformer_blocks.0.attn.to_q"].scale == 5 / 2
    assert noted["transformer_blocks.0.attn.to_q"].rank == 2


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
    adapters, rest = read_adapters(found)
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
    adapters, _ = read_adapters(found, ("unet.",), 1.0)
    assert {m: (a.scale, a.shape) for m, a in adapters.items()} == {
        "mid_block.attentions.0.to_q": (1 / 4, (6, 8)),
        "conv_in": (1 / 4, (5, 2, 3, 3)),
    }
    assert set(read_adapters(found)[0]) == {attention, conv}
    assert set(read_adapters(found, ("transformer.", "unet."))[0]) == set(adapters)


def test_other_keys_are_given_back(tmp_path):
    other = {n: torch.zeros(2) for n in ("vcb.fc1.weight", "vcb.exploration.weight", "vcb.alpha", "flora.bias")}
    found = find(written(tmp_path / "lora.safetensors", pair("transformer.a") | other))
    adapters, rest = read_adapters(found)
    assert set(adapters) == {"a"}
    assert rest == set(other)


ALPHAS = ["m.alpha", "m.lora.alpha", "m.lora_A.alpha", "m.lora_A.default.alpha", "m.lora.down.alpha", "m.lora_up.alpha"]


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("key", ALPHAS)
def test_every_spelling_of_alpha_is_read(tmp_path, key, prefix):
    tensors = pair(f"{prefix}m") | pair("other") | {f"{prefix}{key}": torch.tensor(10.0)}
    adapters, rest = read_adapters(find(written(tmp_path / "lora.safetensors", tensors)))
    assert rest == set()
    assert {m: a.scale for m, a in adapters.items()} == {"m": 2.5, "other": 1.0}


@pytest.mark.parametrize("shape", [(), (1,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_alpha_may_be_of_any_float_type(tmp_path, dtype, shape):
    tensors = pair("m") | {"m.alpha": torch.full(shape, 1.5).to(dtype)}
    assert read_adapters(find(written(tmp_path / "lora.safetensors", tensors)))[0]["m"].scale == 1.5 / 4


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
    listed, _ = read_adapters(found)
    assert not (tmp_path / "cache" / "converted").exists()
    made, _ = read_adapters(converted(found))
    assert {m: a.scale for m, a in listed.items()} == {m: a.scale for m, a in made.items()} == {"m": 2.0, "n": 0.5}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 12}))
    torch.save(pair("m"), tmp_path / "lora.bin", _use_new_zipfile_serialization=not legacy)
    assert read_adapters(find(tmp_path / "lora.bin"))[0]["m"].scale == 3.0


def test_alpha_is_the_tensors_then_the_headers_then_the_configs_then_the_default_then_the_rank(tmp_path):
    tensors = pair("transformer.m") | pair("transformer.n") | pair("transformer.o")
    alpha = {"transformer.o.alpha": torch.tensor(3.0)}

    def scales(name: str, default=None) -> list[float]:
        adapters, _ = read_adapters(find(tmp_path / name), default_alpha=default)
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
    assert {m: a.scale for m, a in read_adapters(find(lora))[0].items()} == {"m": 1.5, "n": 3.0}


def test_the_config_is_found_beside_the_link_and_not_beside_the_blob(tmp_path):
    """As a download cache lays them out."""
    blob = written(tmp_path / "blobs" / "0123", pair("base_model.model.m"))
    snapshot = tmp_path / "snapshots" / "abcd"
    snapshot.mkdir(parents=True)
    (snapshot / "adapter_model.safetensors").symlink_to(blob)
    (snapshot / "adapter_config.json").write_text(json.dumps(NOTE))
    (blob.parent / "adapter_config.json").write_text(json.dumps({"lora_alpha": 50}))
    assert read_adapters(find(snapshot))[0]["m"].scale == 1.5


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
        adapters, rest = read_adapters(found)
        assert adapters.keys() == modules.keys()
        assert rest == others
        for module, spelling in modules.items():
            own = pair(f"{prefix}{module}", spelling=spelling).values()
            references = (adapters[module].down, adapters[module].up)
            for tensor, reference in zip(own, references, strict=True):
                assert torch.equal(tensor, tensor_of(found.folder, reference))
