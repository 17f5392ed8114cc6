"""The commands and snippets of the systems' pages run, on tiny files that lie as the published ones do."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from support.systems import settings_of
from tilewright.cli.main import main
from tilewright.export.systems import system
from tilewright.export.tokenizers import stand_in_clip

ROOT = Path(__file__).parents[3]
FLUX, INSTANTIR = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("flux", "instantir"))
PUBLISHED = {
    "FLUX.1-Fill-dev/transformer/diffusion_pytorch_model.safetensors": ("vicr", "transformer"),
    "FLUX.1-Fill-dev/vae/diffusion_pytorch_model.safetensors": ("vicr", "vae"),
    "FLUX.1-Fill-dev/text_encoder/model.safetensors": ("vicr", "text_encoder"),
    "FLUX.1-Fill-dev/text_encoder_2/model.safetensors": ("vicr", "text_encoder_2"),
    "FLUX.1-Redux-dev/image_encoder/model.safetensors": ("in-token", "image_encoder"),
    "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model.safetensors": ("in-token", "image_embedder"),
    "clip-vit-large-patch14/model.safetensors": ("vicr", "image_encoder"),
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def run_commands(page: str, *more: str) -> int:
    """Run the page's commands at tiny size, restorations with more arguments; how many they are."""
    lines = [line for block in blocks(page, "sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    for line in lines:
        words = [{"full": "tiny"}.get(word, word) for word in shlex.split(line)[1:]]
        words += ["--preset", "tiny"] if words[:2] == ["export", "build"] and "--preset" not in words else []
        words += ["--verify", "never"] if words[:2] == ["export", "build"] and page != FLUX else []
        words += more if words[:2] == ["runtime", "restore"] else []
        assert main(words) == 0, line
    return len(lines)


@pytest.fixture
def files(in_token_tiny: Path, vicr_tiny: Path, tmp_path: Path) -> Path:
    """A folder with everything the page names."""
    bundles = {"in-token": in_token_tiny, "vicr": vicr_tiny}
    for file, (origin, name) in PUBLISHED.items():
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copyfile(bundles[origin] / "weights" / name / f"{name}.safetensors", tmp_path / file)
    from tilewright.export.tokenizers import stand_in_t5

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
    shutil.copy(ROOT / "docs" / "sample.png", tmp_path / "in.png")
    return tmp_path


def test_the_flux_pages_commands_and_snippet_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    assert run_commands(FLUX, "--tile", "64") >= 4
    (snippet,) = blocks(FLUX, "python")
    code = f"{snippet}\nassert len(rounds) == 2 and rounds[0].shape == (512, 512, 3)"
    subprocess.run([sys.executable, "-c", code], cwd=files, check=True)


def test_the_instantir_pages_commands_run(
    instantir_files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for item in instantir_files.iterdir():
        (tmp_path / item.name).symlink_to(item)
    image = Image.open(ROOT / "docs" / "sample.png").resize((24, 16))
    image.save(tmp_path / "in.png")
    monkeypatch.chdir(tmp_path)
    assert run_commands(INSTANTIR, "--steps", "2") == 3


@pytest.mark.parametrize("page", [FLUX, INSTANTIR], ids=["flux", "instantir"])
def test_every_option_the_page_names_exists(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "build", "--help"])
    helped = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["runtime", "restore", "--help"])
    helped += capsys.readouterr().out + "--scores --prompt --lora-scale --batch"
    helped += " ".join(f"--{name.replace('_', '-')}" for name in _inputs("instantir"))
    for flag in sorted(set(re.findall(r"--[a-z][a-z-]+", page))):
        assert flag in helped, flag


def _inputs(name: str) -> list[str]:
    """A program's own arguments, which `restore --help` lists with --bundle only."""
    program = system(name).program(settings_of(name))
    return [*program.inputs, *program.texts, *program.files]
