"""What a user may get wrong with the FLUX systems: one line, the documented exit code, nothing half-written."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tilewright.cli.main import main

TRANSFORMER = "FLUX.1-Fill-dev/transformer/diffusion_pytorch_model.safetensors"
EMBEDDER = "FLUX.1-Redux-dev/image_embedder/diffusion_pytorch_model.safetensors"
PAIR = "transformer.transformer_blocks.0.attn.to_q"


@pytest.fixture
def files(in_token_tiny: Path, tmp_path: Path) -> Path:
    """The tiny weights as published."""
    root, weights = tmp_path / "files", in_token_tiny / "weights"
    for name, file in [
        ("transformer", TRANSFORMER),
        ("vae", "FLUX.1-Fill-dev/vae/diffusion_pytorch_model.safetensors"),
        ("image_encoder", "FLUX.1-Redux-dev/image_encoder/model.safetensors"),
        ("image_embedder", EMBEDDER),
    ]:
        (root / file).parent.mkdir(parents=True)
        shutil.copyfile(weights / name / f"{name}.safetensors", root / file)
    held = load_file(in_token_tiny / "constants.safetensors")
    save_file({"prompt_embeds": held["context"], "pooled_prompt_embeds": held["pooled"]}, root / "prompt.safetensors")
    return root


def changed(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def another_flux(files: Path) -> None:
    narrow = load_file(files / TRANSFORMER)["x_embedder.weight"][:, :16].copy()
    changed(files / TRANSFORMER, lambda t: t.update({"x_embedder.weight": narrow}))


def fill_for_redux(files: Path) -> None:
    shutil.copyfile(files / TRANSFORMER, files / EMBEDDER)


def cut_short(files: Path) -> None:
    data = (files / TRANSFORMER).read_bytes()
    (files / TRANSFORMER).write_bytes(data[: len(data) // 2])


def shard_missing(files: Path) -> None:
    index = {"weight_map": {"x_embedder.weight": "diffusion_pytorch_model-00002-of-00003.safetensors"}}
    (files / f"{TRANSFORMER}.index.json").write_text(json.dumps(index))


def key_missing(files: Path) -> None:
    changed(files / TRANSFORMER, lambda t: t.pop("norm_out.linear.weight"))


def key_too_many(files: Path) -> None:
    changed(files / TRANSFORMER, lambda t: t.update({"controlnet_x.weight": np.zeros(3, np.float32)}))


def no_vae(files: Path) -> None:
    shutil.rmtree(files / "FLUX.1-Fill-dev" / "vae")


def pair(files: Path, module: str, down: tuple[int, int], up: tuple[int, int]) -> None:
    tensors = {f"{module}.lora_A.weight": np.ones(down, np.float32), f"{module}.lora_B.weight": np.ones(up, np.float32)}
    save_file(tensors, files / "in-token.safetensors")


def ranks_differ(files: Path) -> None:
    pair(files, PAIR, (4, 32), (32, 5))


def rank_of_another_size(files: Path) -> None:
    pair(files, PAIR, (4, 8), (32, 4))


def module_unknown(files: Path) -> None:
    pair(files, "transformer.transformer_blocks.7.attn.to_q", (4, 32), (32, 4))


CASES = {
    another_flux: ("takes 16 channels and gives 16: this is another FLUX", "give FLUX.1-Fill-dev"),
    fill_for_redux: ("lacks 4 tensors: redux_down.bias", "give FLUX.1-Redux-dev"),
    cut_short: ("lie outside the file", TRANSFORMER),
    shard_missing: (
        "'diffusion_pytorch_model-00002-of-00003.safetensors', which is not there",
        "copy the missing shard",
    ),
    key_missing: ("lacks 1 tensors: norm_out.linear.weight", "FLUX.1-Fill-dev's transformer"),
    key_too_many: ("unexpected 1 tensors: controlnet_x.weight", "FLUX.1-Fill-dev's transformer"),
    no_vae: ("FLUX.1-Fill-dev's VAE: none of", "give --weights PATH"),
    ranks_differ: ("[4, 32]", "[32, 5]", "one rank"),
    rank_of_another_size: ("'transformer_blocks.0.attn.to_q.lora_A' has shape [4, 8], the network needs [4, 32]",),
    module_unknown: ("transformer_blocks.7.attn.to_q", "does not have"),
}


def said(capsys: pytest.CaptureFixture[str], code: int, *words: str) -> str:
    """The last line of a command that must fail with this code."""
    capsys.readouterr()
    assert main(list(words)) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tilewright:")]
    assert len(lines) == 1 and len(lines[0]) < 700
    return lines[0]


@pytest.mark.parametrize(("spoil", "parts"), CASES.items(), ids=[case.__name__ for case in CASES])
def test_wrong_files_are_told_in_one_line(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    spoil: Callable[[Path], None],
    parts: tuple[str, ...],
) -> None:
    spoil(files)
    build = ("export", "build", "in-token", "--preset", "tiny", "--verify", "never")
    line = said(capsys, 8, *build, "--weights", str(files), "-o", str(tmp_path / "b"))
    assert all(part in line for part in parts), line
    assert not (tmp_path / "b").exists() and not list(tmp_path.glob(".b.*"))


LONG = "word " * 80
ARGUMENTS = {
    "a LoRA that is not there": (8, ["--lora", "nowhere.safetensors"], "nowhere.safetensors is not there"),
    "Redux that is not there": (8, ["--redux", "nowhere"], "nowhere is not there; give --redux"),
    "words without text encoders": (8, ["--prompt", "a bridge"], "text encoder is missing"),
    "no steps": (2, ["--steps", "0"], "--steps 0 must lie in 1..1000"),
    "a tile off the grid": (2, ["--fixed-tile", "30"], "--fixed-tile 30 is no multiple of 4"),
    "bounds that contradict": (2, ["--min-mu", "1.5", "--max-mu", "1"], "--min-mu 1.5 lies above --max-mu 1.0"),
    "tiles that are no list": (2, ["--fixed-tile", "64;32"], "'64;32'"),
    "fixed tiles without the split": (
        2,
        ["--fixed-tile", "64", "--no-split-modulation"],
        "--no-split-modulation out",
    ),
    "an option of another system": (2, ["--clip", "x"], "in-token takes no --clip; it takes --lora"),
    "a choice that is none": (2, ["--lora-mode", "both"], "'both'"),
}


@pytest.mark.parametrize(("code", "words", "part"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_wrong_arguments_are_told_in_one_line(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], code: int, words: list[str], part: str
) -> None:
    build = ("export", "build", "in-token", "--preset", "tiny", "--weights", str(files), "-o", str(tmp_path / "b"))
    line = said(capsys, code, *build, *words)
    assert part in line, line
    assert not (tmp_path / "b").exists()


def test_embeddings_of_another_shape_are_refused(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed(files / "prompt.safetensors", lambda t: t.update({"prompt_embeds": np.zeros((1, 64, 31), np.float32)}))
    build = ("export", "build", "in-token", "--preset", "tiny", "--weights", str(files), "-o", str(tmp_path / "b"))
    assert "'prompt_embeds' has shape [1, 64, 31], not [1, 64, 32]" in said(capsys, 8, *build)


def test_a_prompt_that_is_too_long_is_refused(
    vicr_tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ("export", "build", "in-token", "--preset", "tiny", "--random-weights", "0", "-o", str(tmp_path / "b"))
    assert "has 401 tokens, the network takes 64; use a shorter one" in said(capsys, 2, *build, "--prompt", LONG)
    sample = Path(__file__).parents[3] / "docs" / "sample.png"
    restore = ("runtime", "restore", str(sample), str(tmp_path / "o.png"), "--bundle", str(vicr_tiny))
    assert "has 401 tokens, the network takes 64" in said(capsys, 2, *restore, "--prompt", LONG)
    assert "--prompt is given twice" in said(capsys, 2, *restore, "--prompt", "a", "--prompt", "b")
    assert "No such file" in said(capsys, 8, *restore, "--prompt-embeds", str(tmp_path / "none"))
    assert not (tmp_path / "o.png").exists()


def test_a_margin_below_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = ("export", "build", "vicr", "--preset", "tiny", "--random-weights", "0", "-o", str(tmp_path / "b"))
    assert "--margin-columns -1 must be 0 or more" in said(capsys, 2, *build, "--margin-columns", "-1")
