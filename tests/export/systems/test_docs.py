"""The commands and snippets of the systems' pages run, on tiny files that lie as the published ones do."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from support.pages import ROOT, assert_flags_exist, blocks, page, run_commands
from support.systems import settings_of
from tilewright.export.systems import system
from tilewright.export.tokenizers import stand_in_clip, stand_in_t5

PUBLISHED = {
    "FLUX.1-Fill-dev/transformer/diffusion_pytorch_model.safetensors": ("vicr", "transformer"),
    "FLUX.1-Fill-dev/vae/diffusion_pytorch_model.safetensors": ("vicr", "vae"),
    "FLUX.1-Fill-dev/text_encoder/model.safetensors": ("vicr", "text_encoder"),
    "FLUX.1-Fill-dev/text_encoder_2/model.safetensors": ("vicr", "text_encoder_2"),
    "FLUX.1-Redux-dev/image_encoder/model.safetensors": ("in-token", "image_encoder"),
    "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model.safetensors": ("in-token", "image_embedder"),
    "clip-vit-large-patch14/model.safetensors": ("vicr", "image_encoder"),
}


@pytest.fixture
def files(in_token_tiny: Path, vicr_tiny: Path, tmp_path: Path) -> Path:
    """A folder with everything the page names."""
    bundles = {"in-token": in_token_tiny, "vicr": vicr_tiny}
    for file, (origin, name) in PUBLISHED.items():
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copyfile(bundles[origin] / "weights" / name / f"{name}.safetensors", tmp_path / file)
    for name, text in {"tokenizer_2/tokenizer.json": stand_in_t5(64)}.items() | {
        (f"tokenizer/{name}", text) for name, text in stand_in_clip(64).items()
    }:
        (tmp_path / "FLUX.1-Fill-dev" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "FLUX.1-Fill-dev" / name).write_text(text)
    module = "transformer.single_transformer_blocks.0.attn.to_q"
    pair = {
        f"{module}.lora_A.weight": np.ones((2, 32), np.float32),
        f"{module}.lora_B.weight": np.ones((32, 2), np.float32),
    }
    save_file(pair, tmp_path / "itl.safetensors")
    save_file(pair | load_file(vicr_tiny / "weights" / "lora" / "lora.safetensors"), tmp_path / "vicr.safetensors")
    held = load_file(in_token_tiny / "constants.safetensors")
    embeds = {"prompt_embeds": held["context"], "pooled_prompt_embeds": held["pooled"]}
    save_file(embeds, tmp_path / "prompt.safetensors")
    Image.open(ROOT / "docs" / "sample.png").resize((24, 24)).save(tmp_path / "in.png")
    return tmp_path


@pytest.mark.slow
def test_the_flux_pages_commands_and_snippet_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    build = ("--preset", "tiny", "--verify", "never")  # the files have no configuration; presets say what shapes do not
    assert run_commands(page("flux"), {"build": build, "restore": ("--tile", "64", "--steps", "2")}) == 4
    (snippet,) = blocks(page("flux"), "python")
    code = f"{snippet.text}\nassert len(rounds) == 2 and rounds[0].shape == (96, 96, 3)"
    subprocess.run([sys.executable, "-c", code], cwd=files, check=True)


@pytest.mark.slow
def test_the_instantir_pages_commands_run(
    instantir_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = tmp_path / "InstantIR" / "models"
    models.mkdir(parents=True)
    for item in instantir_files.iterdir():
        (tmp_path / item.name if item.is_dir() else models / item.name).symlink_to(item)
    image = Image.open(ROOT / "docs" / "sample.png").resize((24, 16))
    image.save(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    more = {"build": ("--preset", "tiny", "--verify", "never"), "restore": ("--steps", "2")}
    assert run_commands(page("instantir"), more) == 3


@pytest.mark.parametrize(("name", "systems"), [("flux", ("in-token", "vicr")), ("instantir", ("instantir",))])
def test_every_option_the_page_names_exists(name: str, systems: tuple[str, ...]) -> None:
    text = page(name).replace("`--lora-scale`", "")  # an argument of bundles with a LoRA
    assert_flags_exist(text, *(system(s).program(settings_of(s)) for s in systems))
