"""The commands and the snippet of docs/flux.md run, on tiny files that lie as the published ones do."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tilewright.export.cli import main

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "flux.md").read_text()
PUBLISHED = {
    "FLUX.1-Fill-dev/transformer/diffusion_pytorch_model.safetensors": ("vicr", "transformer"),
    "FLUX.1-Fill-dev/vae/diffusion_pytorch_model.safetensors": ("vicr", "vae"),
    "FLUX.1-Fill-dev/text_encoder/model.safetensors": ("vicr", "text_encoder"),
    "FLUX.1-Fill-dev/text_encoder_2/model.safetensors": ("vicr", "text_encoder_2"),
    "FLUX.1-Redux-dev/image_encoder/model.safetensors": ("in-token", "image_encoder"),
    "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model.safetensors": ("in-token", "image_embedder"),
    "clip-vit-large-patch14/model.safetensors": ("vicr", "image_encoder"),
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture
def files(in_token_tiny: Path, vicr_tiny: Path, tmp_path: Path) -> Path:
    """A folder with everything the page names."""
    bundles = {"in-token": in_token_tiny, "vicr": vicr_tiny}
    for file, (system, name) in PUBLISHED.items():
        (tmp_path / file).parent.mkdir(parents=True)
        shutil.copyfile(bundles[system] / "weights" / name / f"{name}.safetensors", tmp_path / file)
    from tilewright.export.tokenizers import stand_in_clip, stand_in_t5

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


def test_the_pages_commands_and_snippet_run(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    lines = [line for block in blocks("sh") for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(lines) >= 4
    for line in lines:
        words = [{"full": "tiny"}.get(word, word) for word in shlex.split(line)[1:]]
        if words[:2] == ["runtime", "restore"]:
            words += ["--tile", "64"]
        assert main(words) == 0, line
    (snippet,) = blocks("python")
    code = f"{snippet}\nassert len(rounds) == 2 and rounds[0].shape == (512, 512, 3)"
    subprocess.run([sys.executable, "-c", code], cwd=files, check=True)


def test_every_option_the_page_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "build", "--help"])
    helped = capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["runtime", "restore", "--help"])
    helped += capsys.readouterr().out + "--scores --prompt --lora-scale"
    for flag in sorted(set(re.findall(r"--[a-z][a-z-]+", PAGE))):
        assert flag in helped, flag
