"""The measures against other implementations and closed forms."""

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from train.metrics import gmsd, luma, psnr, ssim


def pair(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 256, (47, 38, 3), dtype=np.uint8)
    return np.clip(truth + random.normal(0, 20, truth.shape), 0, 255).astype(np.uint8), truth


def test_psnr_is_that_of_scikit_image():
    image, truth = pair()
    assert psnr(image, truth) == pytest.approx(peak_signal_noise_ratio(truth, image), rel=1e-12)
    assert psnr(truth, truth) == float("inf")


def test_ssim_is_that_of_scikit_image():
    image, truth = pair()
    words = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255, "full": True}
    _, field = structural_similarity(luma(truth), luma(image), **words)
    assert ssim(image, truth) == pytest.approx(field[5:-5, 5:-5].mean(), rel=1e-10)
    assert ssim(truth, truth) == pytest.approx(1)


def test_gmsd_is_what_loops_give():
    image, truth = pair()
    fields = []
    for picture in (image, truth):
        grey = luma(picture)[:46, :38].reshape(23, 2, 19, 2).mean((1, 3))
        magnitude = np.zeros((21, 17))
        for i in range(21):
            for j in range(17):
                part = grey[i : i + 3, j : j + 3]
                across = (part[:, 0] - part[:, 2]).sum() / 3
                down = (part[0] - part[2]).sum() / 3
                magnitude[i, j] = np.sqrt(across**2 + down**2)
        fields.append(magnitude)
    a, b = fields
    similarity = (2 * a * b + 170) / (a * a + b * b + 170)
    assert gmsd(image, truth) == pytest.approx(np.sqrt(np.square(similarity - similarity.mean()).mean()), rel=1e-10)
    assert gmsd(truth, truth) == 0
