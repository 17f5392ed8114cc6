"""TokSR's sizes are those of its files: networks of another size than any preset, and what files may not say."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTextModel

from support.commands import refused
from support.eager import eager_engines
from support.programs import assert_stored
from support.systems import decided, user_files
from support.toksr import Denoiser, picture_of, tokens_of
from support.toksr_files import CLIP_TEXT, FULL, OTHER, TINY, clip, shapes_of, untold, written
from tilewright.export.graph.trace import parameter_specs
from tilewright.export.system import Settings, UserFiles
from tilewright.export.systems import system
from tilewright.export.tokenizers import put, stand_in_clip
from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import Signature

TOKSR = system("toksr")
ORIGIN_OF = {"tokenizer": "tokenizer", "clip": "text_encoder", "dit": "dit"}


def files_of(named: dict[str, str]) -> UserFiles:
    return user_files({ORIGIN_OF[name]: Path(path) for name, path in named.items()})


def settings_of(named: dict[str, str], sizes: dict[str, Any] = TINY, **options: Any) -> Settings:
    return decided(TOKSR, files_of(named), **untold(sizes), **options)


# Sizes


def test_the_stored_program_is_the_one_of_the_full_preset():
    assert_stored("toksr", TOKSR, decided(TOKSR, user_files({})))


def test_the_parameters_of_the_full_preset_are_the_published_ones():
    held = {"tokenizer": {}, "dit": {}, "text_encoder": {}}
    for component, source in TOKSR.components(decided(TOKSR, user_files({}))).items():
        for parameter, spec in parameter_specs(source).items():
            place, name = held[TOKSR.origin_of(component, parameter)], TOKSR.keys(component, parameter)[0]
            assert name not in place  # no tensor is two parameters
            place[name] = tuple(spec.shape)
    assert held["tokenizer"] == shapes_of(FULL, "encoder", "decoder")
    assert held["dit"] == shapes_of(FULL, "dit")
    assert held["tokenizer"]["decoder.ffn.0.weight"] == (768, 1024, 1, 1)
    millions = {name: round(sum(map(math.prod, shapes.values())) / 1e6, 1) for name, shapes in held.items()}
    assert (millions["tokenizer"], millions["dit"]) == (390.2, 114.8)
    with torch.device("meta"):
        config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12}
        towers = CLIPModel(CLIPConfig(text_config=config)).state_dict()
    assert held["text_encoder"] == {n: tuple(t.shape) for n, t in towers.items() if n.startswith("text_model.")}


@pytest.mark.parametrize("asked", [{}, {"guidance": 2.0, "text_mode": "all77"}, {"steps": 1000}], ids=str)
@pytest.mark.parametrize("preset", TOKSR.presets)
def test_every_program_could_run(preset, asked):
    settings = decided(TOKSR, user_files({}), preset, **asked)
    components = {n: Signature(c.inputs, c.outputs) for n, c in TOKSR.components(settings).items()}
    check_program(TOKSR.program(settings), components, {})


def test_networks_of_another_size_are_pytorchs_of_the_same_files(tmp_path):
    named = written(tmp_path, OTHER)
    files = files_of(named)
    settings = settings_of(named, OTHER)
    engines = eager_engines(TOKSR, settings, files.tensors)
    text, tokenise, step, detokenise = (engines[name].network for name in ("text", "tokenise", "step", "detokenise"))
    draw = torch.Generator().manual_seed(0)
    ids = torch.tensor([[62, 5, 9, 63, 0, 0, 0, 0]])
    words, pooled = text(ids)
    bare = CLIPTextModel.from_pretrained(tmp_path / "clip").eval()
    assert bare.config.hidden_act == "gelu"
    with torch.no_grad():
        expected = bare(ids)
        tower = clip().text_model(ids)
    torch.testing.assert_close(words, expected.last_hidden_state)
    torch.testing.assert_close(pooled, expected.pooler_output)
    torch.testing.assert_close(tower.pooler_output, expected.pooler_output)
    image, tokens = torch.rand(2, 3, 24, 24, generator=draw), torch.randn(2, 3, 1, 5, generator=draw)
    with torch.no_grad():
        condition, picture = tokenise(image), detokenise(tokens, words)
        scalars = {"t": 999.0, "alpha": 0.6, "beta": 0.8, "alpha_next": 1.0, "beta_next": 0.0}
        numbers = {name: torch.tensor([value]) for name, value in scalars.items()}
        ours = step(tokens, condition, **numbers, pooled=pooled)
        torch.testing.assert_close(condition.double(), tokens_of(tokenise, OTHER, image), rtol=0, atol=1e-5)
        torch.testing.assert_close(picture.double(), picture_of(detokenise, OTHER, tokens, words), rtol=0, atol=1e-5)
        denoiser = Denoiser(step, OTHER["dit"]["heads"])
        for tile in range(2):
            noise = denoiser(tokens[tile].double(), condition[tile].double(), 999.0, pooled.double())
            x0 = (tokens[tile].double() - 0.8 * noise) / 0.6
            torch.testing.assert_close(ours[tile].double(), x0, rtol=0, atol=2e-5)


def test_tiles_are_those_of_the_tokenizer_and_share_as_much_of_them(tmp_path):
    settings = settings_of(written(tmp_path, OTHER), OTHER)
    tiles = TOKSR.program(settings).passes[1].tiles
    assert (tiles.px, tiles.overlap_px, tiles.fixed_px) == (24, 4, (24,))  # an eighth is less than a patch
    assert TOKSR.program(settings).multiple_px == 4


def test_heads_that_nothing_tells_are_64_wide_and_named(tmp_path, caplog):
    named = written(tmp_path, OTHER)
    with caplog.at_level(logging.WARNING, "tilewright"):
        settings = decided(TOKSR, files_of(named), encoder_heads=2)
    said = [record.message for record in caplog.records]
    assert [settings.sizes["tokenizer"]["decoder"]["heads"], settings.sizes["dit"]["heads"]] == [1, 2]
    assert [line.split(":")[0] for line in said] == ["tokenizer", "tokenizer's decoder", "denoiser"]
    assert "using scale 0.7525; give --token-scale if they differ" in said[0]
    assert "using heads 1; give --decoder-heads" in said[1]
    assert f"weights {named['dit']} alone does not tell all sizes; using heads 2; give --dit-heads" in said[2]


def test_a_text_tower_without_configuration_is_told_by_shapes(tmp_path, caplog):
    named = written(tmp_path, TINY)
    (tmp_path / "clip" / "config.json").unlink()
    with caplog.at_level(logging.WARNING, "tilewright"):
        settings = settings_of(named)
    shown = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
    assert {name: settings.sizes["clip"][name] for name in shown} == {name: CLIP_TEXT[name] for name in shown}
    (line,) = (record.message for record in caplog.records if record.message.startswith("CLIP"))
    assert "num_attention_heads 1, hidden_act 'quick_gelu', layer_norm_eps 1e-05; give its config.json" in line


def test_no_library_of_networks_is_loaded_for_sizes_and_tokenizers(tmp_path):
    named = written(tmp_path, TINY)
    asked = {**named, **untold(TINY)}
    code = f"""import sys, pathlib
from tilewright.export.build.request import Request
request = Request('toksr', None, pathlib.Path('b'), system_options={asked!r})
request.settings
request.components
request.system.tokenizers(request.settings, request.options, None)
print(*sys.modules)"""
    for _ in range(2):  # the first converts the pickle
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "diffusers"} & set(done.stdout.split())


# Bad input


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return Path.mkdir, (Path("run"),)


def altered(name, changes):
    """Spoils a file of tensors; None takes one out."""

    def spoil(folder):
        read, write = (torch.load, torch.save) if name.endswith(".bin") else (load_file, save_file)
        write({n: t for n, t in (read(folder / name) | changes).items() if t is not None}, folder / name)

    return spoil


BIN, DENOISER, TOWERS = "tatitok_bl32_vae.bin", "dit.safetensors", "clip/model.safetensors"
NORM, ENDS = "text_model.final_layer_norm.bias", "encoder.conv_out.weight"
NO_TEXT = {name: None for name in shapes_of(TINY, "encoder", "decoder") if "text_guidance" in name}


def said(**changes):
    """Changes what CLIP's configuration says of its text tower; None takes a key out."""

    def spoil(folder):
        path = folder / "clip" / "config.json"
        document = json.loads(path.read_text())
        text = document["text_config"] | changes
        document["text_config"] = {name: value for name, value in text.items() if value is not None}
        path.write_text(json.dumps(document))

    return spoil


def another_class(folder):
    (folder / "clip" / "config.json").write_text(json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))


SPOILT = {  # what is done to the files, and what is said of it
    "a quantiser": (altered(BIN, {"quantize.embedding.weight": torch.ones(8, 4)}), "('quantize.embedding.weight')"),
    "no text": (altered(BIN, NO_TEXT), "lacks 'decoder.text_guidance_"),
    "no variance": (altered(BIN, {ENDS: torch.ones(4, 32, 1, 1)}), "gives no mean and variance of 4 numbers"),
    "code": (altered(BIN, {"latent_tokens": Code()}), "holds more than tensors"),
    "another key": (altered(BIN, {"encoder.x": torch.ones(3)}), "unexpected 1 tensors: encoder.x; give TA-TiTok's"),
    "another's denoiser": (
        altered(DENOISER, {"dit.embed.weight": torch.ones(32, 3)}),
        "files/tatitok_bl32_vae.bin gives 4 of 4, words of 16; give the two",
    ),
    "no picture": (altered(BIN, {"encoder.positional_embedding": torch.ones(17)}), "has shape [17]; no tokenizer that"),
    "another's words": (
        altered(BIN, {"decoder.text_guidance_proj.weight": torch.ones(32, 24)}),
        "files/clip/model.safetensors gives 8 of 16; give the two that belong",
    ),
    "no denoiser": (altered(DENOISER, {"dit.embed.weight": None}), "lacks 'dit.embed.weight' and holds dit.blocks.0"),
    "half a denoiser": (altered(DENOISER, {"dit.out.bias": None}), "lacks 1 tensors: dit.out.bias; give TokSR's"),
    "no tokenizer": (
        lambda folder: (folder / "clip" / "vocab.json").unlink(),
        "vocab.json missing; give the folder with",
    ),
    "half a text tower": (altered(TOWERS, {NORM: None}), f"lacks 1 tensors: {NORM}; give CLIP ViT-L/14-336's"),
    "another text tower": (said(intermediate_size=48), "'intermediate_size' is 48, in weights"),
    "fewer words": (said(max_position_embeddings=None), "'max_position_embeddings' is 77, in weights"),
    "another end": (said(eos_token_id=7), "'eos_token_id' is 7, where texts end with the last id, 63"),
    "heads that do not fit": (said(num_attention_heads=3), "16 is no multiple of 'num_attention_heads' 3"),
    "an unknown activation": (said(hidden_act="mish"), "'hidden_act' is 'mish'"),
    "another class": (another_class, "is of class BertModel, expected is"),
    "more words than rows": (
        lambda folder: put(folder / "clip", stand_in_clip(65)),
        "has 65 ids, the network's table has 64 rows; is it the tokenizer of this encoder?",
    ),
}
ASKED = {  # code, what is left out or added, and what is said of it
    "no tokenizer": (2, "tokenizer", [], "neither --tokenizer PATH nor --random-weights SEED is given"),
    "no CLIP": (8, "clip", [], "CLIP ViT-L/14-336's text tower is not given; give --clip"),
    "no denoiser": (8, "dit", [], "TokSR's denoiser is not given; give --dit"),
    "a batch of none": (2, "", ["--batch", "0"], "--batch 0 is not a whole number from 1 to 32"),
    "a batch too large": (2, "", ["--batch", "99"], "--batch 99 is not a whole number from 1 to 32"),
    "no guidance": (2, "", ["--guidance", "nan"], "invalid finite value: 'nan'"),
    "no steps": (2, "", ["--steps", "0"], "--steps 0 must lie in 1..1000"),
    "heads that do not fit": (8, "", ["--dit-heads", "3"], "3 heads do not divide its width 32; give --dit-heads"),
    "a scale of nothing": (8, "", ["--token-scale", "0"], "--token-scale 0.0: tokens are divided by it"),
    "another preset": (2, "", ["--preset", "textok"], "preset 'textok' has image 256, weights"),
}


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return written(tmp_path / "files", TINY)


def refused_build(capsys, code, part, given, *words):
    given = [word for name, value in given.items() for word in (f"--{name}", value)]
    heads = [word for name, value in untold(TINY).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    build = ("export", "build", "toksr", "--verify", "never", "-o", "b")
    refused(capsys, code, part, *build, *heads, *given, *words)


@pytest.mark.parametrize(("spoil", "part"), SPOILT.values(), ids=SPOILT)
def test_wrong_files_are_told_in_one_line(given, capsys, spoil, part):
    spoil(Path("files"))
    refused_build(capsys, 8, part, given)


@pytest.mark.parametrize(("code", "left_out", "words", "part"), ASKED.values(), ids=ASKED)
def test_wrong_arguments_are_told_in_one_line(given, capsys, code, left_out, words, part):
    refused_build(capsys, code, part, {n: v for n, v in given.items() if n != left_out}, *words)
