"""Every kind of picture in and out; oracles are Pillow's own conversions and loops over pixels."""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from tilewright.runtime.errors import InputError, ResourceError, UsageError
from tilewright.runtime.images.canvas import Enlarged, fill, padded
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.images.write import assemble, check_writable, write_image

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
GREY_PROFILE = SRGB[:16] + b"GRAY" + SRGB[20:]
CMYK_PROFILE = SRGB[:16] + b"CMYK" + SRGB[20:]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def saved(folder: Path, image: Image.Image, name: str = "in.png", **options: object) -> Path:
    image.save(folder / name, **options)
    return folder / name


def same_rgb(picture: Picture, image: Image.Image) -> bool:
    return np.array_equal(picture.rgb, np.asarray(image.convert("RGB")))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def message(error: pytest.ExceptionInfo[Exception]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# Reading: modes


@pytest.mark.parametrize("mode", ["1", "L"])
def test_grey_files_give_three_equal_channels(tmp_path: Path, mode: str) -> None:
    source = Image.fromarray(noise(5, 7)).convert(mode)
    picture = read_image(saved(tmp_path, source))
    assert picture.grey and picture.alpha is None and picture.icc is None
    assert picture.rgb.shape == (5, 7, 3) and picture.rgb.dtype == np.uint8 and same_rgb(picture, source)


def test_grey_with_alpha_keeps_both(tmp_path: Path) -> None:
    pixels = noise(5, 7, 2)
    picture = read_image(saved(tmp_path, Image.fromarray(pixels)))
    assert picture.grey
    assert np.array_equal(picture.rgb[:, :, 1], pixels[:, :, 0])
    assert np.array_equal(picture.alpha, pixels[:, :, 1])


def test_colour_files_give_their_pixels(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    picture = read_image(str(saved(tmp_path, Image.fromarray(pixels))))
    assert not picture.grey and picture.alpha is None and np.array_equal(picture.rgb, pixels)
    assert picture.rgb.flags.c_contiguous


def test_colour_with_alpha_keeps_both(tmp_path: Path) -> None:
    pixels = noise(5, 7, 4)
    picture = read_image(saved(tmp_path, Image.fromarray(pixels)))
    assert np.array_equal(picture.rgb, pixels[:, :, :3]) and np.array_equal(picture.alpha, pixels[:, :, 3])
    assert not picture.grey and picture.alpha is not None and picture.alpha.flags.c_contiguous


def test_a_palette_gives_its_colours(tmp_path: Path) -> None:
    source = Image.fromarray(noise(5, 7, 3)).quantize(16)
    picture = read_image(saved(tmp_path, source))
    assert not picture.grey and picture.alpha is None and same_rgb(picture, source)


@pytest.mark.parametrize("transparency", [3, bytes([0, 80, 255, 10])], ids=["index", "table"])
def test_a_palette_with_transparency_gives_alpha(tmp_path: Path, transparency: int | bytes) -> None:
    path = saved(tmp_path, Image.fromarray(noise(5, 7, 3)).quantize(16), transparency=transparency)
    with Image.open(path) as source:
        assert source.mode == "P"
        expected = np.asarray(source.convert("RGBA"))
    picture = read_image(path)
    assert np.array_equal(picture.rgb, expected[:, :, :3]) and np.array_equal(picture.alpha, expected[:, :, 3])
    assert picture.alpha is not None and picture.alpha.min() < 255


def test_the_transparent_value_of_a_grey_png_becomes_alpha(tmp_path: Path) -> None:
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3)
    picture = read_image(saved(tmp_path, Image.fromarray(pixels), transparency=4))
    assert picture.grey and np.array_equal(picture.alpha, np.where(pixels == 4, 0, 255))


def test_the_transparent_value_of_a_one_bit_png_becomes_alpha(tmp_path: Path) -> None:
    pixels = noise(4, 5) > 127
    picture = read_image(saved(tmp_path, Image.fromarray(pixels), transparency=255))
    assert picture.grey and np.array_equal(picture.alpha, np.where(pixels, 0, 255))


def test_the_transparent_colour_of_a_png_becomes_alpha(tmp_path: Path) -> None:
    pixels = noise(3, 4, 3)
    picture = read_image(saved(tmp_path, Image.fromarray(pixels), transparency=tuple(map(int, pixels[1, 2]))))
    expected = np.full((3, 4), 255)
    expected[1, 2] = 0
    assert np.array_equal(picture.alpha, expected) and np.array_equal(picture.rgb, pixels)


@pytest.mark.parametrize(("mode", "suffix"), [("CMYK", "jpg"), ("CMYK", "tif"), ("YCbCr", "jpg"), ("LAB", "tif")])
def test_files_in_other_colour_spaces_are_converted(tmp_path: Path, mode: str, suffix: str) -> None:
    path = saved(tmp_path, Image.fromarray(noise(8, 9, 3)).convert(mode), f"in.{suffix}")
    with Image.open(path) as source:
        assert source.mode == ("RGB" if mode == "YCbCr" else mode)
        assert same_rgb(read_image(path), source)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "HSV", "RGBX", "P"])
def test_pillow_images_in_other_modes_are_converted(mode: str) -> None:
    source = Image.fromarray(noise(8, 9, 3)).convert(mode)
    picture = read_image(source)
    assert not picture.grey and picture.alpha is None and same_rgb(picture, source) and source.mode == mode


@pytest.mark.parametrize(("mode", "straight"), [("RGBa", "RGBA"), ("La", "LA"), ("PA", "RGBA")])
def test_pillow_images_with_other_kinds_of_alpha_keep_it(mode: str, straight: str) -> None:
    source = Image.fromarray(noise(4, 5, 4)).convert("LA" if mode == "La" else "RGBA").convert(mode)
    picture, expected = read_image(source), np.asarray(source.convert(straight))
    assert picture.grey == (mode == "La") and np.array_equal(picture.alpha, expected[:, :, -1])
    assert np.array_equal(picture.rgb[:, :, 0], expected[:, :, 0])


# Reading: 16 bits


def deep_values() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16).reshape(256, 256)


def nearest(values: np.ndarray) -> np.ndarray:
    return np.round(values / 257).astype(np.uint8)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I;16L"])
def test_every_16_bit_grey_rounds_to_the_nearest_of_8_bits(mode: str) -> None:
    order = ">u2" if mode == "I;16B" else "<u2"
    source = Image.frombytes(mode, (256, 256), deep_values().astype(order).tobytes())
    picture = read_image(source)
    assert picture.grey and picture.alpha is None and np.array_equal(picture.rgb[:, :, 2], nearest(deep_values()))


@pytest.mark.parametrize("name", ["in.png", "in.tif"])
def test_16_bit_grey_files_are_rounded(tmp_path: Path, name: str) -> None:
    source = Image.frombytes("I;16", (256, 256), deep_values().astype("<u2").tobytes())
    assert np.array_equal(read_image(saved(tmp_path, source, name)).rgb[:, :, 0], nearest(deep_values()))


def test_a_big_endian_16_bit_tiff_is_rounded(tmp_path: Path) -> None:
    source = Image.frombytes("I;16B", (256, 256), deep_values().astype(">u2").tobytes())
    path = saved(tmp_path, source, "in.tif")
    assert path.read_bytes()[:2] == b"MM"
    assert np.array_equal(read_image(path).rgb[:, :, 0], nearest(deep_values()))


def test_a_16_bit_pgm_is_rounded(tmp_path: Path) -> None:
    path = tmp_path / "in.pgm"
    path.write_bytes(b"P5 256 256 65535\n" + deep_values().astype(">u2").tobytes())
    assert np.array_equal(read_image(path).rgb[:, :, 0], nearest(deep_values()))


def test_the_transparent_value_of_a_16_bit_png_is_compared_before_rounding(tmp_path: Path) -> None:
    values = np.array([[1000, 1001, 65535]], dtype=np.uint16)
    rows = b"\0" + values.astype(">u2").tobytes()
    path = tmp_path / "in.png"
    path.write_bytes(png(3, 1, depth=16, colour=0, rows=rows, extra=chunk(b"tRNS", struct.pack(">H", 1001))))
    picture = read_image(path)
    assert picture.alpha is not None and picture.alpha.tolist() == [[255, 0, 255]]
    assert picture.rgb[0, :, 0].tolist() == [4, 4, 255]


def test_integer_images_within_16_bits_are_rounded() -> None:
    source = Image.fromarray(deep_values().astype(np.int32))
    assert source.mode == "I"
    assert np.array_equal(read_image(source).rgb[:, :, 0], nearest(deep_values()))


@pytest.mark.parametrize("value", [65536, -1])
def test_integer_images_beyond_16_bits_are_refused(value: int) -> None:
    with pytest.raises(InputError, match=str(value)) as error:
        read_image(Image.new("I", (2, 2), value))
    assert "scale it" in message(error)


def test_floating_point_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="mode F") as error:
        read_image(saved(tmp_path, Image.new("F", (2, 2), 0.5), "in.tif"))
    assert str(tmp_path) in message(error) and "convert it" in message(error)


# Reading: orientation, frames, profiles


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The EXIF table, word for word: which side of the scene the stored row 0 and column 0 are."""
    swapped = pixels.swapaxes(0, 1)
    return {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: swapped,
        6: swapped[:, ::-1],
        7: swapped[::-1, ::-1],
        8: swapped[::-1],
    }[orientation]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["in.png", "in.webp", "in.tif"])
def test_exif_orientation_is_applied_once(tmp_path: Path, orientation: int, name: str) -> None:
    pixels, exif = noise(4, 6, 4), Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if name == "in.webp" else {}
    picture = read_image(saved(tmp_path, Image.fromarray(pixels), name, exif=exif, **options))
    expected = upright(pixels, orientation)
    assert np.array_equal(picture.rgb, expected[:, :, :3]) and np.array_equal(picture.alpha, expected[:, :, 3])
    assert picture.rgb.flags.c_contiguous


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_to_jpeg_and_16_bit_grey(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, Image.fromarray(noise(8, 24, 3)), "in.jpg", exif=exif)
    with Image.open(path) as stored:
        assert np.array_equal(read_image(path).rgb, upright(np.asarray(stored), orientation))
    deep = Image.frombytes("I;16", (3, 2), np.arange(0, 60000, 10000, dtype="<u2").tobytes())
    path = saved(tmp_path, deep, "in.png", exif=exif)
    assert np.array_equal(read_image(path).rgb, upright(read_image(deep).rgb, orientation))


def test_a_damaged_exif_block_does_not_hinder_reading(tmp_path: Path) -> None:
    pixels = noise(4, 6, 3)
    path = saved(tmp_path, Image.fromarray(pixels), exif=b"Exif\0\0no such header at all")
    assert np.array_equal(read_image(path).rgb, pixels)


def test_an_animated_file_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "green", "blue")]
    path = saved(tmp_path, frames[0], "in.gif", save_all=True, append_images=frames[1:])
    picture = read_image(path)
    assert (picture.rgb == [255, 0, 0]).all() and picture.rgb.shape == (4, 4, 3)


@pytest.mark.parametrize(("mode", "profile"), [("RGB", SRGB), ("L", GREY_PROFILE)])
def test_a_profile_that_describes_the_pixels_is_kept(tmp_path: Path, mode: str, profile: bytes) -> None:
    path = saved(tmp_path, Image.new(mode, (2, 2)), icc_profile=profile)
    assert read_image(path).icc == profile


@pytest.mark.parametrize(("mode", "profile"), [("CMYK", CMYK_PROFILE), ("L", SRGB), ("RGB", b"")])
def test_a_profile_for_other_pixels_is_dropped(tmp_path: Path, mode: str, profile: bytes) -> None:
    path = saved(tmp_path, Image.new(mode, (2, 2)), "in.tif", icc_profile=profile)
    assert read_image(path).icc is None


# Reading: arrays


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
def test_grey_arrays_give_three_equal_channels(shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    picture = read_image(pixels)
    assert picture.grey and picture.alpha is None
    assert np.array_equal(picture.rgb, np.dstack([pixels.reshape(5, 7)] * 3)) and picture.rgb.flags.c_contiguous


@pytest.mark.parametrize("channels", [3, 4])
def test_colour_arrays_are_taken_whatever_their_strides(channels: int) -> None:
    pixels = noise(10, 14, channels)[::2, ::-2]
    picture = read_image(pixels)
    assert not picture.grey and np.array_equal(picture.rgb, pixels[:, :, :3]) and picture.rgb.flags.c_contiguous
    assert picture.alpha is None if channels == 3 else np.array_equal(picture.alpha, pixels[:, :, 3])


@pytest.mark.parametrize("dtype", [np.float32, np.uint16, np.int8, bool])
def test_arrays_of_other_types_are_refused(dtype: type) -> None:
    with pytest.raises(InputError, match=np.dtype(dtype).name) as error:
        read_image(np.zeros((4, 4, 3), dtype))
    assert "0..255" in message(error)


@pytest.mark.parametrize("shape", [(), (4,), (4, 4, 2), (4, 4, 5), (1, 4, 4, 3)])
def test_arrays_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError) as error:
        read_image(np.zeros(shape, np.uint8))
    assert str(list(shape)) in message(error) and "[H, W, 3]" in message(error)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0, 3), (0, 0, 4)])
def test_empty_arrays_and_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=f"{shape[1]}x{shape[0]}") as error:
        read_image(np.zeros(shape, np.uint8))
    assert "1x1" in message(error)
    with pytest.raises(InputError, match="no pixels"):
        read_image(Image.new("RGB", (shape[1], shape[0])))


def test_other_objects_are_refused() -> None:
    with pytest.raises(InputError, match="bytes") as error:
        read_image(b"in.png")  # type: ignore[arg-type]
    assert "pass a path" in message(error)


# Reading: sizes beyond a limit


def huge_png(folder: Path, width: int, height: int) -> Path:
    path = folder / "huge.png"
    path.write_bytes(png(width, height, depth=8, colour=2, rows=b"\0" * 8))
    return path


@pytest.mark.parametrize("side", [10_001, 12_000, 30_000, 2_000_000])
def test_a_file_over_the_limit_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings(), pytest.raises(InputError, match=f"{side}x{side} = {side * side} ") as error:
        warnings.simplefilter("error")
        read_image(huge_png(tmp_path, side, side))
    assert "100000000" in message(error) and "max_pixels" in message(error)
    assert before == Image.MAX_IMAGE_PIXELS


def test_the_limit_is_inclusive_and_can_be_changed(tmp_path: Path) -> None:
    pixels = noise(4, 5, 3)
    path = saved(tmp_path, Image.fromarray(pixels))
    for source in (path, pixels, Image.fromarray(pixels)):
        assert read_image(source, max_pixels=20).rgb.shape == (4, 5, 3)
        with pytest.raises(InputError, match="limit of 19"):
            read_image(source, max_pixels=19)


@pytest.mark.parametrize("name", ["in.png", "in.tif", "in.webp", "in.gif"])
@pytest.mark.parametrize("pillow_limit", [1, 15])
def test_pillows_own_limit_neither_warns_nor_refuses_nor_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pillow_limit: int
) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 5)), name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_image(path).rgb.shape == (5, 4, 3)
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


def test_pillows_own_limit_outlives_reads_that_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path, Image.new("RGB", (64, 64)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 7)
    failures: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(30):
                read_image(path)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and Image.MAX_IMAGE_PIXELS == 7


# Reading: files that cannot be read


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file") as error:
        read_image(tmp_path / "none.png")
    assert "none.png" in message(error) and "check the path" in message(error)


def test_a_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="directory") as error:
        read_image(tmp_path)
    assert str(tmp_path) in message(error)


@pytest.mark.parametrize("content", [b"", b"hello, world\n" * 50, b"\x89PNG\r\n\x1a\n", b"GIF89a"])
@pytest.mark.parametrize("name", ["in.png", "in.webp", "in"])
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="not an image") as error:
        read_image(tmp_path / name)
    assert "PNG, JPEG" in message(error) and error.value.exit_code == 8


def test_formats_that_pillow_reads_with_other_programs_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.new("RGB", (2, 2)), "in.eps")
    with pytest.raises(InputError, match="not an image"):
        read_image(path)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "bmp"])
@pytest.mark.parametrize("share", [0.5, 0.9])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path = saved(tmp_path, Image.fromarray(noise(64, 64, 3)), f"in.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match=r"in\.") as error:
        read_image(path)
    assert "damaged" in message(error)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["png", "jpg", "tif", "gif", "webp"]), st.integers(0, 400), st.binary(min_size=1, max_size=6))
def test_damage_gives_a_picture_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, offset: int, damage: bytes
) -> None:
    path = saved(tmp_path_factory.getbasetemp(), Image.fromarray(noise(9, 9, 3)), f"damaged.{suffix}")
    content = path.read_bytes()
    path.write_bytes(content[:offset] + damage + content[offset + len(damage) :])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            assert read_image(path, max_pixels=10_000).rgb.dtype == np.uint8
        except InputError as error:
            assert "\n" not in str(error)


# Upsampling


def filled(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    rgb = np.full((height, width, 3), 77, np.uint8)
    fill(rgb, 0, 0, canvas)
    return rgb


def whole(rgb: np.ndarray, scale: int, multiple: int, least: int = 1) -> np.ndarray:
    enlarged = Enlarged(rgb, scale, multiple, least)
    return enlarged.crop(0, 0, *enlarged.shape[1:])


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_enlarging_is_pillows_bicubic(scale: int) -> None:
    rgb = noise(15, 17, 3)
    expected = np.asarray(Image.fromarray(rgb).resize((17 * scale, 15 * scale), Image.Resampling.BICUBIC))
    assert np.array_equal(filled(whole(rgb, scale, 1), 15 * scale, 17 * scale), expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([1, 8, 16]), st.data())
def test_a_crop_is_what_the_whole_has_there(height: int, width: int, scale: int, multiple: int, data: Any) -> None:
    """Crops at the edges, inside, reaching into the padding, and in the padding of a least side."""
    enlarged = Enlarged(noise(height, width, 3), scale, multiple, data.draw(st.sampled_from([1, 50, 96])))
    _, rows, columns = enlarged.shape
    top, left = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, columns - 1))
    high, wide = data.draw(st.integers(1, rows - top)), data.draw(st.integers(1, columns - left))
    expected = enlarged.crop(0, 0, rows, columns)[:, top : top + high, left : left + wide]
    assert np.array_equal(enlarged.crop(top, left, high, wide), expected)


def test_a_picture_filled_part_by_part_is_the_picture_filled_at_once() -> None:
    canvas = np.random.default_rng(0).uniform(-0.2, 1.2, (3, 32, 48)).astype(np.float32)
    rgb = np.full((29, 41, 3), 77, np.uint8)
    for top in (0, 16):
        for left in (0, 20, 40, 44):  # the last two reach past the picture, and one begins there
            fill(rgb, top, left, canvas[:, top : top + 16, left : left + 20])
    assert np.array_equal(rgb, filled(canvas, 29, 41))


def test_alpha_is_enlarged_to_fit_with_the_same_filter() -> None:
    rgb, alpha = noise(6, 9, 3), noise(2, 3)
    expected = np.asarray(Image.fromarray(alpha).resize((9, 6), Image.Resampling.BICUBIC))
    assert np.array_equal(assemble(rgb, Picture(rgb, alpha, False, None))[..., 3], expected)


# Canvases


def reflected(index: int, side: int, padded: int) -> int:
    if padded - side > side - 1:
        return min(index, side - 1)
    return index if index < side else 2 * (side - 1) - index


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 23), st.integers(1, 23), st.sampled_from([1, 2, 7, 8, 16]))
def test_a_canvas_is_reflected_or_repeats_the_edge(height: int, width: int, multiple: int) -> None:
    rgb = noise(height, width, 3)
    canvas = whole(rgb, 1, multiple)
    _, rows, columns = canvas.shape
    assert canvas.dtype == np.float32 and canvas.flags.c_contiguous
    assert rows % multiple == 0 and 0 <= rows - height < multiple
    assert columns % multiple == 0 and 0 <= columns - width < multiple
    for y in range(rows):
        for x in range(columns):
            expected = rgb[reflected(y, height, rows), reflected(x, width, columns)]
            assert np.array_equal(canvas[:, y, x], expected.astype(np.float32) / np.float32(255))


@pytest.mark.parametrize(
    ("side", "multiple", "least", "expected"),
    [
        (1, 1, 1, 1),
        (17, 16, 1, 32),
        (17, 16, 32, 32),
        (17, 16, 48, 48),
        (64, 16, 48, 64),  # a side longer than the least is padded to the multiple alone
        (65, 16, 64, 80),
        (17, 16, 40, 48),  # the least is itself padded
    ],
)
def test_a_side_is_padded_to_the_multiple_and_to_the_least(side: int, multiple: int, least: int, expected: int) -> None:
    assert padded(side, multiple, least) == expected
    assert Enlarged(noise(side, 3, 3), 1, multiple, least).shape == (
        3,
        expected,
        max(-(-3 // multiple) * multiple, -(-least // multiple) * multiple),
    )


@pytest.mark.parametrize(("height", "width", "scale"), [(20, 33, 1), (33, 20, 1), (5, 40, 1), (1, 1, 1), (10, 13, 2)])
def test_a_canvas_with_a_least_side_is_reflected_where_that_reaches_and_else_repeats_the_edge(
    height: int, width: int, scale: int
) -> None:
    rgb = noise(height, width, 3)
    canvas = whole(rgb, scale, 8, 48)
    large = np.asarray(Image.fromarray(rgb).resize((width * scale, height * scale), Image.Resampling.BICUBIC))
    large = rgb if scale == 1 else large
    assert canvas.shape == (3, 48, 48)
    rows, columns = ([reflected(i, side * scale, 48) for i in range(48)] for side in (height, width))
    expected = large[np.ix_(rows, columns)].transpose(2, 0, 1).astype(np.float32) / np.float32(255)
    assert np.array_equal(canvas, expected)
    assert np.array_equal(filled(canvas, height * scale, width * scale), large)  # what was padded is cut off again


def test_a_canvas_survives_the_way_back_at_any_strides() -> None:
    rgb = noise(600, 41, 3)[::2, ::-1]
    canvas = whole(rgb, 1, 8)
    assert np.array_equal(filled(canvas, 300, 41), rgb)


def test_a_canvas_is_clamped_rounded_and_left_alone() -> None:
    values = np.array([-np.inf, -1, -0.001, 0, 0.49 / 255, 0.51 / 255, 127.5 / 255, 1, 1.001, 7, np.inf, np.nan])
    canvas = np.broadcast_to(values.astype(np.float32), (3, 2, 12)).copy()
    before = canvas.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rgb = filled(canvas, 1, 12)
    assert rgb[0, :, 1].tolist() == [0, 0, 0, 0, 0, 1, 128, 255, 255, 255, 255, 0]
    assert rgb.shape == (1, 12, 3) and np.array_equal(canvas, before, equal_nan=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_a_canvas_rounds_to_the_nearest(height: int, width: int, seed: int) -> None:
    canvas = np.random.default_rng(seed).uniform(-0.2, 1.2, (3, height + 2, width + 3)).astype(np.float32)
    expected = np.floor(np.clip(canvas[:, :height, :width], 0, 1) * np.float32(255) + np.float32(0.5))
    assert np.array_equal(filled(canvas, height, width), expected.transpose(1, 2, 0))


# Assembling


def test_a_result_has_the_layout_of_its_source() -> None:
    rgb, alpha = noise(6, 8, 3), noise(6, 8, seed=1)
    luma = np.asarray(Image.fromarray(rgb).convert("L"))
    weighted = (rgb.astype(np.int64) @ [19595, 38470, 7471] + 32768) >> 16
    assert np.array_equal(luma, weighted)
    assert np.array_equal(assemble(rgb, Picture(rgb, None, False, None)), rgb)
    assert np.array_equal(assemble(rgb, Picture(rgb, None, True, None)), luma)
    assert np.array_equal(assemble(rgb, Picture(rgb, alpha, False, None)), np.dstack((rgb, alpha)))
    assert np.array_equal(assemble(rgb, Picture(rgb, alpha, True, None)), np.dstack((luma, alpha)))


def test_a_grey_result_can_be_changed_by_its_owner() -> None:
    rgb = noise(6, 8, 3)
    assert assemble(rgb, Picture(rgb, None, True, None)).flags.writeable


# Writing

LAYOUTS = [(5, 7), (5, 7, 2), (5, 7, 3), (5, 7, 4)]
WITH_ALPHA = [".png", ".webp", ".tif", ".tiff"]


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("suffix", [*WITH_ALPHA, ".PNG"])
def test_lossless_formats_give_back_what_was_written(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    pixels = noise(*shape)
    write_image(tmp_path / f"out{suffix}", pixels)
    picture = read_image(tmp_path / f"out{suffix}")
    again = assemble(picture.rgb, Picture(picture.rgb, picture.alpha, len(shape) == 2 or shape[2] == 2, None))
    assert np.array_equal(again, pixels)
    assert picture.grey == (shape in LAYOUTS[:2] and suffix != ".webp")


@pytest.mark.parametrize("shape", LAYOUTS)
@pytest.mark.parametrize("suffix", [".bmp", ".jpg", ".jpeg"])
def test_formats_without_alpha_drop_it(tmp_path: Path, shape: tuple[int, ...], suffix: str) -> None:
    pixels = np.broadcast_to(np.uint8(90), shape).copy()
    if shape[2:] in ((2,), (4,)):
        pixels[:, :, -1] = 3
    write_image(tmp_path / f"out{suffix}", pixels)
    picture = read_image(tmp_path / f"out{suffix}")
    assert picture.alpha is None and picture.grey == (shape in LAYOUTS[:2])
    assert (abs(picture.rgb.astype(int) - 90) <= 1).all()


def test_bmp_gives_back_colour_exactly(tmp_path: Path) -> None:
    pixels = noise(5, 7, 3)
    write_image(str(tmp_path / "out.bmp"), pixels)
    assert np.array_equal(read_image(tmp_path / "out.bmp").rgb, pixels)


def test_jpeg_keeps_full_colour_resolution_at_quality_95(tmp_path: Path) -> None:
    pixels = noise(16, 16, 3)
    write_image(tmp_path / "out.jpg", pixels)
    Image.fromarray(pixels).save(tmp_path / "reference.jpg", quality=95, subsampling=0)
    assert (tmp_path / "out.jpg").read_bytes() == (tmp_path / "reference.jpg").read_bytes()


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif"])
def test_a_profile_is_written_with_the_pixels_it_describes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_image(path, noise(4, 4, 3), icc=SRGB)
    assert read_image(path).icc == SRGB
    write_image(path, noise(4, 4), icc=GREY_PROFILE)
    with Image.open(path) as image:
        assert image.info.get("icc_profile") == (None if suffix == ".webp" else GREY_PROFILE)
    write_image(path, noise(4, 4, 3), icc=CMYK_PROFILE)
    with Image.open(path) as image:
        assert not image.info.get("icc_profile")


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    for seed in (1, 2):
        write_image(tmp_path / "out.png", noise(4, 4, 3, seed=seed))
    assert np.array_equal(read_image(tmp_path / "out.png").rgb, noise(4, 4, 3, seed=2))
    assert [path.name for path in tmp_path.iterdir()] == ["out.png"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out.png").symlink_to(tmp_path / "real" / "file.bin")
    write_image(tmp_path / "out.png", noise(4, 4))
    assert (tmp_path / "out.png").is_symlink() and (tmp_path / "real" / "file.bin").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_umask_decides_the_mode_of_the_file(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_image(tmp_path / "out.png", noise(4, 4))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("failure", [RuntimeError("broken"), KeyboardInterrupt(), OSError(28, "No space left")])
def test_a_write_that_fails_half_way_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "out.png"
    write_image(path, noise(4, 4))
    before = path.read_bytes()

    def half(image: Image.Image, file: object, *args: object, **options: object) -> None:
        file.write(b"half a file")  # type: ignore[attr-defined]
        raise failure

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(ResourceError if isinstance(failure, OSError) else type(failure)) as error:
        write_image(path, noise(4, 4, seed=1))
    assert path.read_bytes() == before and [child.name for child in tmp_path.iterdir()] == ["out.png"]
    if isinstance(error.value, ResourceError):
        assert "No space left" in message(error) and str(path) in message(error)


def test_a_replacement_that_fails_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ResourceError, match="not permitted"):
        write_image(tmp_path / "out.png", noise(4, 4))
    assert not list(tmp_path.iterdir())


def test_the_file_is_on_disk_before_it_takes_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sync = os.fsync

    def watched(descriptor: int) -> None:
        assert not (tmp_path / "out.png").exists()
        sizes.append(os.fstat(descriptor).st_size)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    write_image(tmp_path / "out.png", noise(4, 4))
    assert sizes == [(tmp_path / "out.png").stat().st_size]


@pytest.mark.parametrize(
    ("name", "shape", "limit"),
    [
        ("out.jpg", (1, 65501), "65500"),
        ("out.jpeg", (65501, 1, 4), "65500"),
        ("out.webp", (16384, 1, 3), "16383"),
        ("out.tif", (40_000, 40_000, 3), str(2**32 - 2**20)),
        ("out.bmp", (40_000, 40_000, 4), str(2**32 - 2**20)),
    ],
)
def test_a_size_the_format_cannot_hold_is_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], limit: str
) -> None:
    with pytest.raises(UsageError, match=limit) as error:
        write_image(tmp_path / name, np.broadcast_to(np.uint8(0), shape))
    assert "use .png" in message(error) and f"{shape[1]}x{shape[0]}" in message(error)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "side"), [("out.jpg", 65500), ("out.webp", 16383), ("out.png", 70000)])
def test_the_largest_side_a_format_holds_is_written(tmp_path: Path, name: str, side: int) -> None:
    write_image(tmp_path / name, np.zeros((1, side), np.uint8))
    assert read_image(tmp_path / name).rgb.shape == (1, side, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".PNG", ".JpG"])
def test_known_suffixes_are_writable_and_nothing_is_created(tmp_path: Path, suffix: str) -> None:
    check_writable(tmp_path / f"out{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.gif", "out", "out.png.bak"])
def test_unknown_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    for refuse in (check_writable, lambda path: write_image(path, noise(4, 4))):
        with pytest.raises(UsageError, match="suffix") as error:
            refuse(tmp_path / name)
        assert ".png" in message(error) and repr(Path(name).suffix) in message(error) and error.value.exit_code == 2


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    for name, expected in [
        ("folder.png", "name a file"),
        ("none/out.png", "create it first"),
        ("file/out.png", "create it first"),
    ]:
        with pytest.raises(UsageError, match=expected) as error:
            check_writable(tmp_path / name)
        assert name in message(error)
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(UsageError, match="not writable"):
        check_writable(tmp_path / "out.png")


# The whole way


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 2), (1, 1, 3), (1, 1, 4)])
def test_one_pixel_goes_all_the_way(tmp_path: Path, shape: tuple[int, ...]) -> None:
    pixels = noise(*shape)
    write_image(tmp_path / "in.png", pixels)
    picture = read_image(tmp_path / "in.png")
    canvas = whole(picture.rgb, 4, 64)
    assert canvas.shape == (3, 64, 64)
    result = assemble(filled(canvas, 4, 4), picture)
    assert result.shape == (4, 4, *shape[2:]) and (result == pixels).all()
    for suffix in [*WITH_ALPHA, ".jpg", ".bmp"]:
        write_image(tmp_path / f"out{suffix}", assemble(picture.rgb[:1, :1], read_image(picture.rgb[:1, :1])))
        assert read_image(tmp_path / f"out{suffix}").rgb.shape == (1, 1, 3)
