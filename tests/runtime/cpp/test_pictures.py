"""Pictures of 8 and 16 bits in the C++ library, as the Python runtime reads and writes them."""

import numpy as np
import pytest
from PIL import Image

from tilewright.runtime.images.write import write_image
from tilewright.runtime.restore import load

pytestmark = pytest.mark.slow  # the compiler takes a while
pyvips = pytest.importorskip("pyvips", reason="Python restores 16 bits with it")


def deep(channels: int) -> np.ndarray:
    random = np.random.default_rng(channels)
    y, x = np.mgrid[:37, :53]
    waves = np.stack([30000 + 25000 * np.sin(x / (4 + c) + y / 6) for c in range(channels)], -1)
    return (waves + random.normal(0, 900, waves.shape)).clip(0, 65535).astype(np.uint16)


def write(path, pixels: np.ndarray) -> None:
    """A PNG file, which keeps its bits."""
    height, width, channels = pixels.shape
    kind = "ushort" if pixels.dtype == np.uint16 else "uchar"
    image = pyvips.Image.new_from_memory(pixels.tobytes(), width, height, channels, kind)
    if kind == "ushort":
        image = image.copy(interpretation="grey16" if channels < 3 else "rgb16")
    image.write_to_file(str(path))


def read(path) -> np.ndarray:
    image = pyvips.Image.new_from_file(str(path))
    return image.numpy().reshape(image.height, image.width, image.bands)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("stored", [8, 16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_depth_has_pythons_pixels(run, bundle, tmp_path, monkeypatch, channels, stored, bits):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    source, target, right = tmp_path / "in.png", tmp_path / "out.png", tmp_path / "right.png"
    pixels = deep(channels)
    write(source, pixels if stored == 16 else (pixels >> 8).astype(np.uint8))
    with load(bundle, batch=1, engine="ort") as restorer:
        ticket = restorer.submit(source, beside=right, bits=bits)
        with ticket.keeping(tmp_path / "keep"):
            restoration = ticket.result()
            write_image(right, restoration.image)
    done = run("tilewright-restore", "--bundle", bundle, source, target, "--batch", 1, "--bits", bits)
    assert done.returncode == 0, done.stderr
    result, expected = read(target), read(right)
    assert result.dtype == expected.dtype == (np.uint16 if bits == 16 else np.uint8)
    assert result.shape == expected.shape
    difference = np.abs(result.astype(int) - expected.astype(int))
    assert difference.max() <= 1
    assert (difference == 0).mean() >= 0.999


def test_a_transparent_grey_of_16_bits_is_read_as_in_python(run, bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    source, target = tmp_path / "in.png", tmp_path / "out.png"
    pixels = deep(1)[:, :, 0]
    pixels[:9] = 770
    Image.fromarray(pixels).save(source, transparency=770)
    with load(bundle, batch=1, engine="ort") as restorer:
        expected = restorer(source)
    assert run("tilewright-restore", "--bundle", bundle, source, target, "--batch", 1).returncode == 0
    assert np.array_equal(read(target), expected)


def test_another_depth_is_refused(run, bundle, tmp_path):
    done = run("tilewright-restore", "--bundle", bundle, tmp_path / "i.png", tmp_path / "o.png", "--bits", 12)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--bits 12 is no depth of a channel; use 8 or 16" in done.stderr
