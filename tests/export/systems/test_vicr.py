"""VICR end to end, against a pipeline of diffusers' and transformers' own parts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from support.cards import check_card
from support.fill import Canvas, Vicr, distance, psnr
from support.systems import components_of, settings_of
from tilewright.cli.main import main
from tilewright.export.build.request import Request
from tilewright.export.build.run import build
from tilewright.export.networks.vision import ClipVision
from tilewright.export.systems.flux.sizes import PRESETS
from tilewright.export.systems.flux.vicr import SYSTEM
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime import load
from tilewright.runtime.bundle.program import Program, Signature
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.errors import InputError, UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.plan.noise import normal
from tilewright.runtime.text import token_ids

SIZES = PRESETS["tiny"]
SPATIAL, CHANNELS = SIZES.spatial, SIZES.channels
WORDS = "a stone bridge"
PROGRAMS = Path(__file__).parents[2] / "programs"


class Counting:
    """An engine that counts its calls and keeps what it gives."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.made = engine, []

    def run(self, inputs: Any, wanted: Any) -> Any:
        outputs = self.engine.run(inputs, wanted)
        self.made.append(outputs)
        return outputs

    def close(self) -> None:
        """It is somebody else's."""


def counted(restorer: Any) -> dict[str, Counting]:
    return {name: Counting(restorer.engines[name]) for name in restorer.engines}


def held(bundle: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(bundle / "weights" / name / f"{name}.safetensors")


def texts(bundle: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Context and pooled vector by transformers' own classes, of the ids that the bundle's tokenizers give."""
    t5 = T5EncoderModel(T5Config(**SIZES.t5)).eval()
    weights = held(bundle, "text_encoder_2")
    t5.load_state_dict(weights | {"encoder.embed_tokens.weight": weights["shared.weight"]}, strict=True)
    clip = CLIPTextModel(CLIPTextConfig(**SIZES.clip_text | {"eos_token_id": 2})).eval()
    clip.load_state_dict({k.removeprefix("text_model."): t for k, t in held(bundle, "text_encoder").items()})
    ids = (
        torch.from_numpy(token_ids(bundle / "tokenizers" / file, WORDS, n))
        for file, n in (("t5.json", SIZES.words), ("clip.json", SIZES.clip_words))
    )
    return t5(next(ids)).last_hidden_state, clip(next(ids)).pooler_output


def eager(bundle: Path, parts: tuple[Any, Any]) -> Vicr:
    """The system from upstream parts."""
    clip = CLIPVisionModelWithProjection(CLIPVisionConfig(**SIZES.clip_vision)).eval()
    clip.load_state_dict(held(bundle, "image_encoder"), strict=True)
    pixels = ClipVision(SIZES.clip_vision).pixels
    with torch.no_grad():
        context, pooled = texts(bundle)
    return Vicr(*parts, SIZES.schedule, clip, pixels, held(bundle, "lora"), context, pooled)


@pytest.mark.parametrize(("width", "height"), [(32, 32), (36, 52)])
def test_the_whole_trajectory_and_the_picture_are_those_of_upstream_parts(
    vicr_tiny: Path, upstream: Callable[[Path], tuple[Any, Any]], width: int, height: int
) -> None:
    image = sample_photo(width, height, 1).transpose(2, 0, 1).astype(np.float32) / 255
    rows, columns = height // SPATIAL, 2 * width // SPATIAL
    # a private value's noise is its tile's own: region 1 is the first tile
    noise = normal(5, region=1, stream=0, channels=CHANNELS, top=0, left=0, height=rows, width=columns)
    path, expected = eager(vicr_tiny, upstream(vicr_tiny)).walk(image, noise, 30)
    with load(vicr_tiny) as restorer:
        engines = counted(restorer)
        ids = {
            name: token_ids(vicr_tiny / "tokenizers" / file, WORDS, n)
            for name, file, n in (("t5_ids", "t5.json", SIZES.words), ("clip_ids", "clip.json", SIZES.clip_words))
        }
        ours = run(restorer.bundle.program, engines, restorer.constants, Job(Canvas(image), seed=5, inputs=ids))
    assert len(engines["step"].made) == 30
    for outputs, latent in zip(engines["step"].made, path, strict=True):
        assert distance(outputs["z_next"], latent) <= 1e-4
    assert psnr(ours, expected) >= 60
    assert ours.std() > 0.05


def test_the_full_program_is_the_one_that_the_runtime_is_tested_with() -> None:
    settings, components = settings_of("vicr", "full"), components_of("vicr", "full")
    assert SYSTEM.program(settings) == from_json(Program, (PROGRAMS / "vicr.json").read_text(), "vicr")
    signatures = json.loads((PROGRAMS / "vicr.signatures.json").read_text())["components"]
    assert signatures.keys() == components.keys()
    for name, signature in signatures.items():
        expected = from_json(Signature, json.dumps(signature), name)
        assert Signature(components[name].inputs, components[name].outputs) == expected


def test_rounds_repeat_only_what_the_words_decide(vicr_tiny: Path) -> None:
    picture = sample_photo(40, 24, 1)
    with load(vicr_tiny) as restorer:
        engines = counted(restorer)
        sitting = restorer.sitting(picture, scale=1, steps=3, seed=4)
        restorer.executor.devices[0].engines = engines
        one, two, again = (sitting(prompt=words) for words in (WORDS, "an old map", WORDS))
        calls = {name: len(engine.made) for name, engine in engines.items()}
        fresh = restorer(picture, scale=1, steps=3, seed=4, prompt="an old map")
    assert calls == {"encode": 1, "see": 1, "bridge": 1, "t5": 3, "clip": 3, "modulate": 3, "step": 9, "decode": 3}
    assert np.array_equal(one, again) and np.array_equal(two, fresh)
    assert not np.array_equal(one, two)


def test_embeddings_stand_for_words(vicr_tiny: Path, tmp_path: Path) -> None:
    with torch.no_grad():
        context, pooled = texts(vicr_tiny)
    save_file({"prompt_embeds": context.numpy(), "pooled_prompt_embeds": pooled.numpy()}, tmp_path / "p.safetensors")
    picture = sample_photo(40, 24, 1)
    with load(vicr_tiny) as restorer:
        by_words = restorer(picture, scale=1, steps=3, prompt=WORDS)
        engines = counted(restorer)
        sitting = restorer.sitting(picture, scale=1, steps=3)
        restorer.executor.devices[0].engines = engines
        by_embeds = sitting(prompt_embeds=tmp_path / "p.safetensors")
        assert not engines["t5"].made and not engines["clip"].made
        with pytest.raises(UsageError, match=r"^prompt has no default"):
            restorer(picture)
        save_file({"prompt_embeds": np.zeros((1, 3, 32), np.float32)}, tmp_path / "half.safetensors")
        with pytest.raises(InputError, match="lacks the tensor 'pooled_prompt_embeds'"):
            restorer(picture, prompt_embeds=tmp_path / "half.safetensors")
        short = {"prompt_embeds": np.zeros((1, 3, 32), np.float32), "pooled_prompt_embeds": pooled.numpy()}
        save_file(short, tmp_path / "short.safetensors")
        with pytest.raises(InputError, match=r"shape \[1, 3, 32\]"):
            restorer(picture, prompt_embeds=tmp_path / "short.safetensors")
    assert np.abs(by_words.astype(int) - by_embeds).max() <= 1


def built(tmp_path: Path, **options: Any) -> Path:
    build(Request("vicr", "tiny", tmp_path / "b", seed=0, verify="never", system_options=options))
    return tmp_path / "b"


def test_a_margin_of_columns_is_decoded_instead_of_the_canvas(vicr_tiny: Path, tmp_path: Path) -> None:
    margin, differ = 16, {}
    with load(built(tmp_path, margin_columns=margin)) as ours, load(vicr_tiny) as whole:
        for width in (24, 64):
            picture = sample_photo(width, 40, 1)
            one, other = (r(picture, scale=1, steps=3, prompt=WORDS).astype(int) for r in (ours, whole))
            differ[width] = np.abs(one - other)
    assert 24 // SPATIAL <= margin < 64 // SPATIAL
    assert differ[24].max() <= 1  # all columns are beside it
    assert differ[64].max() > 0 and np.median(differ[64]) <= 8  # the VAE's norms and attention see fewer columns


def test_without_text_encoders_only_embeddings_are_taken(
    tmp_path: Path, vicr_tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = built(tmp_path, no_text=True)
    assert not read_bundle(bundle).manifest.components.keys() & {"t5", "clip"}
    assert not (bundle / "tokenizers").exists()
    with torch.no_grad():
        context, pooled = texts(vicr_tiny)
    save_file({"prompt_embeds": context.numpy(), "pooled_prompt_embeds": pooled.numpy()}, tmp_path / "p.safetensors")
    picture = sample_photo(40, 24, 1)
    with load(bundle) as restorer, load(vicr_tiny) as other:
        ours = restorer(picture, scale=1, steps=3, prompt_embeds=tmp_path / "p.safetensors")
        theirs = other(picture, scale=1, steps=3, prompt=WORDS)
        assert np.abs(ours.astype(int) - theirs).max() <= 1
        with pytest.raises(UsageError, match="unknown argument 'prompt'; this bundle takes prompt_embeds, guidance"):
            restorer(picture, prompt=WORDS)
        with pytest.raises(UsageError, match="prompt_embeds has no default; give it a value"):
            restorer(picture)
    (tmp_path / "here").mkdir()
    (tmp_path / "p.safetensors").rename(tmp_path / "here" / "prompt_embeds.safetensors")
    check_card(bundle, tmp_path / "here", monkeypatch)


def test_the_whole_modulation_in_the_step_gives_the_same_picture(vicr_tiny: Path, tmp_path: Path) -> None:
    bundle, picture = built(tmp_path, no_split_modulation=True), sample_photo(40, 24, 1)
    with load(bundle) as restorer, load(vicr_tiny) as other:
        ours, theirs = (r(picture, scale=1, steps=3, prompt=WORDS) for r in (restorer, other))
    assert np.abs(ours.astype(int) - theirs).max() <= 1


def lora(path: Path, seed: int = 1) -> Path:
    """A LoRA on what VICR's reaches, beside the bridge of the random weights."""
    generator = np.random.Generator(np.random.Philox(key=seed))
    dim = SIZES.dim
    shapes = {
        "x_embedder": (dim, SIZES.transformer["in_channels"]),
        "transformer_blocks.0.norm1.linear": (6 * dim, dim),
        "transformer_blocks.1.attn.to_q": (dim, dim),
        "transformer_blocks.1.ff.net.0.proj": (4 * dim, dim),
        "single_transformer_blocks.0.norm.linear": (3 * dim, dim),
        "single_transformer_blocks.1.proj_out": (dim, 5 * dim),
        "norm_out.linear": (2 * dim, dim),
    }
    tensors = {}
    for module, (rows, columns) in shapes.items():
        tensors[f"transformer.{module}.lora_A.weight"] = generator.normal(0, 0.3, (4, columns)).astype(np.float32)
        tensors[f"transformer.{module}.lora_B.weight"] = generator.normal(0, 0.3, (rows, 4)).astype(np.float32)
        tensors[f"transformer.{module}.alpha"] = np.array(8, np.float32)
    save_file(tensors, path)
    return path


def test_a_lora_beside_the_weights_equals_one_merged_into_them(vicr_tiny: Path, tmp_path: Path) -> None:
    bridge = load_numpy(vicr_tiny / "weights" / "lora" / "lora.safetensors")
    lora(tmp_path / "pairs.safetensors")
    save_file(load_numpy(tmp_path / "pairs.safetensors") | bridge, tmp_path / "vicr.safetensors")
    given = {"lora": f"{tmp_path / 'vicr.safetensors'}:0.5"}
    branch, merged = built(tmp_path / "branch", **given), built(tmp_path / "merge", **given, lora_mode="merge")
    picture, made = sample_photo(40, 24, 1), {}
    for name, bundle, inputs in [
        ("base", vicr_tiny, {}),
        ("off", branch, {"lora_scale": 0.0}),
        ("branch", branch, {}),
        ("merged", merged, {}),
    ]:
        with load(bundle) as restorer:
            options = {"prompt": WORDS, **inputs}
            made[name] = restorer(picture, scale=1, steps=3, **options).astype(int)
    assert np.abs(made["off"] - made["base"]).max() <= 1
    assert np.abs(made["branch"] - made["merged"]).max() <= 1
    assert np.abs(made["branch"] - made["base"]).mean() > 2
    weights = read_bundle(merged).weights
    folders = {r.folder for r in weights.tensors["step"].values()}
    assert len(folders) == 2 and "merged" in folders  # those that the LoRA changes, and those as they are
    assert "merged" not in {r.folder for r in read_bundle(branch).weights.tensors["step"].values()}


def test_a_bundle_says_which_of_its_weights_are_random(vicr_tiny: Path, tmp_path: Path) -> None:
    assert read_bundle(vicr_tiny).manifest.options["weights"] == "random, seed 0"
    bridge = load_numpy(vicr_tiny / "weights" / "lora" / "lora.safetensors")
    lora(tmp_path / "pairs.safetensors")
    save_file(load_numpy(tmp_path / "pairs.safetensors") | bridge, tmp_path / "vicr.safetensors")
    options = read_bundle(built(tmp_path, lora=str(tmp_path / "vicr.safetensors"))).manifest.options
    assert options["weights"] == "random, seed 0, but for lora" and options["packed"] == "no"


def test_a_profile_takes_words(vicr_tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["runtime", "profile", "--bundle", str(vicr_tiny), "--resolutions", "32", "--steps", "2", "--json"]
    assert main([*words, "--prompt", WORDS]) == 0
    (setting,) = json.loads(capsys.readouterr().out)["settings"]
    (row,) = setting["resolutions"]
    assert (row["width"], row["height"]) == (32, 32) and {"t5", "step", "decode"} <= row["phases"].keys()
    assert main(words) == 2
    assert "--prompt has no default" in capsys.readouterr().err
