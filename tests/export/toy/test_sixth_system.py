"""A sixth system, from a package that names it as an entry point: it lists, builds, verifies and restores."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from tilewright.cli.main import main
from tilewright.export.systems import SYSTEMS
from tilewright.export.verify.sample import sample_photo

PACKAGES = Path(__file__).parent / "packages"
STRENGTH, ALPHA, GAIN = 0.5, 3.0, 1.5


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package and its metadata lie where Python looks."""
    monkeypatch.syspath_prepend(str(PACKAGES))
    for name in [name for name in sys.modules if name.split(".")[0] == "toy_restoration"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def weights(tmp_path: Path) -> dict[str, torch.Tensor]:
    """toy.safetensors, and a LoRA beside."""
    random = torch.Generator().manual_seed(0)
    shapes = {"look.weight": (6, 3, 3, 3), "look.bias": (6,), "mix.weight": (12, 6), "mix.bias": (12,)}
    weights = {name: 0.3 * torch.randn(shape, generator=random) for name, shape in shapes.items()}
    save_file(weights, tmp_path / "toy.safetensors")
    pair = {"mix.lora_A.weight": (2, 6), "mix.lora_B.weight": (12, 2), "mix.alpha": ()}
    pair = {name: torch.randn(shape, generator=random) for name, shape in pair.items()} | {
        "mix.alpha": torch.tensor(ALPHA)
    }
    save_file(pair, tmp_path / "lora.safetensors")
    return weights | pair


def expected(weights: dict[str, torch.Tensor], picture: np.ndarray) -> np.ndarray:
    """The picture twice as large, in float64."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    large = Image.fromarray(picture).resize((2 * picture.shape[1], 2 * picture.shape[0]), Image.Resampling.BICUBIC)
    image = torch.from_numpy(np.asarray(large).transpose(2, 0, 1)[None] / 255)
    features = F.silu(F.conv2d(image, w["look.weight"], w["look.bias"], stride=2, padding=1))
    mix = w["mix.weight"] + STRENGTH * ALPHA / 2 * w["mix.lora_B.weight"] @ w["mix.lora_A.weight"]
    pixels = torch.einsum("oc,bchw->bohw", mix, features) + w["mix.bias"][:, None, None]
    return 255 * (GAIN * F.pixel_shuffle(pixels, 2)).clamp(0, 1)[0].permute(1, 2, 0).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["branch", "merge"])
def test_it_builds_verifies_and_restores_with_no_change_anywhere(
    cache: Path,
    installed: None,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    mode: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "toy" not in SYSTEMS
    assert main(["export", "list", "--json"]) == 0
    assert {"toy", "hitoksr"} <= {row["system"] for row in json.loads(capsys.readouterr().out)}
    lora = ["--lora", f"lora.safetensors:{STRENGTH}", "--lora-mode", mode]
    assert main(["export", "build", "toy", "--weights", ".", "--gain", str(GAIN), *lora, "-o", "bundle"]) == 0
    assert main(["export", "verify", "bundle"]) == 0
    picture = sample_photo(24, 18, 1)
    Image.fromarray(picture).save("in.png")
    assert main(["runtime", "restore", "in.png", "out.png", "--bundle", "bundle"]) == 0
    ours, wanted = np.asarray(Image.open("out.png")).astype(float), expected(weights, picture)
    assert ours.shape == (36, 48, 3) and wanted.std() > 20
    assert np.abs(ours - wanted).max() <= 0.51
    assert main(["export", "build", "toy", "--weights", ".", "--gain", str(GAIN), *lora, "-o", "bundle"]) == 0
    assert "up to date" in capsys.readouterr().out


@pytest.mark.slow
def test_another_lora_or_precision_runs_only_what_depends_on_it(
    cache: Path,
    installed: None,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    other = {name: 2 * tensor for name, tensor in weights.items() if name.startswith("mix.lora")}
    save_file(other | {"mix.alpha": weights["mix.alpha"]}, "other.safetensors")

    def ran(lora: str, *words: str) -> set[str]:
        build = ["export", "build", "toy", "--weights", ".", "--lora", lora, "--verify", "never", "-o", "b", "--json"]
        assert main([*build, "--target", "ort,openvino", *words]) == 0
        return set(json.loads(capsys.readouterr().out)["stages"])

    ran("lora.safetensors", "--precision", "float32")
    assert ran("other.safetensors", "--precision", "float32") == {"attach", "constants", "optimise", "seal"}
    assert ran("other.safetensors", "--precision", "float32,bfloat16") == {"seal"}
    assert ran("lora.safetensors", "--precision", "bfloat16,float32") == {"seal"}  # its parts are in the cache
    assert ran("lora.safetensors", "--precision", "float32,bfloat16") == set()


def test_without_the_package_there_is_no_such_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "build", "toy", "--random-weights", "0", "-o", str(tmp_path / "b")]) == 2
    assert f"system 'toy' is not one of {', '.join(SYSTEMS)}" in capsys.readouterr().err
