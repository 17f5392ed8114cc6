"""How alike pictures are, and how far the values that steps pass on drift apart."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.metrics import structural_similarity

from support.stepped import GAIN, STEPS
from tilewright.calib.judge.likeness import psnr, relative, ssim
from tilewright.calib.judge.trial import Trial
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import InputError


def test_ssim_is_that_of_scikit_image() -> None:
    rng = np.random.default_rng(0)
    exact = rng.random((3, 24, 31))
    near = np.clip(exact + rng.normal(0, 0.1, exact.shape), 0, 1)
    luma = [np.tensordot([0.299, 0.587, 0.114], picture, 1) for picture in (near, exact)]
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    _, field = structural_similarity(*luma, full=True, **options)
    assert ssim(near, exact) == pytest.approx(field[5:-5, 5:-5].mean(), rel=1e-10)
    assert ssim(exact, exact) == pytest.approx(1)
    assert 0 < ssim(near[:, :4, :4], exact[:, :4, :4]) < 1  # smaller than the window


def test_equal_pictures_have_a_finite_likeness() -> None:
    assert psnr(np.ones((3, 2, 2)), np.full((3, 2, 2), 1.5)) == 200
    assert psnr(np.zeros((3, 2, 2)), np.full((3, 2, 2), 0.1)) == pytest.approx(20)
    assert relative([(np.zeros(2), np.zeros(2))]) == 0


class Shifted:
    """An engine whose output is a little too large."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        return {name: array + np.float32(0.01) for name, array in self.engine.run(inputs, outputs).items()}

    def close(self) -> None:
        """Nothing of its own."""


def test_drift_is_the_distance_of_each_steps_value_in_all_tiles(stepping: Path, pictures: Path, tmp_path: Path) -> None:
    picture = pictures / "1.png"  # two tiles
    image = np.asarray(Image.open(picture), np.float64).transpose(2, 0, 1) / 255
    ours, exact, expected = np.zeros_like(image), np.zeros_like(image), []
    for _ in range(STEPS):
        ours, exact = GAIN * (ours + image) + 0.01, GAIN * (exact + image)
        expected.append(np.linalg.norm(ours - exact) / np.linalg.norm(exact))
    Image.new("RGB", (32, 16), (255, 255, 255)).save(tmp_path / "white.png")
    with Trial(read_bundle(stepping), [picture], threads=1, originals=[tmp_path / "white.png"]) as trial:
        score = trial.score({"step": Shifted(trial.restorer.engines["step"])})
        unchanged = trial.score({})
    assert list(score.drift) == ["z"] and np.allclose(score.drift["z"], expected, rtol=1e-4)
    assert unchanged.drift["z"] == (0.0,) * STEPS and unchanged.changed is None
    white = [psnr(np.clip(z, 0, 1), np.ones_like(z)) for z in (ours, exact)]
    assert np.allclose([score.truth_db[0], unchanged.truth_db[0]], white, atol=1e-3)


def test_an_original_of_another_size_is_refused(stepping: Path, pictures: Path) -> None:
    with pytest.raises(InputError, match=r"1\.png has 32x16 px, the restored picture 16x16"):
        Trial(read_bundle(stepping), [pictures / "0.png"], threads=1, originals=[pictures / "1.png"])
