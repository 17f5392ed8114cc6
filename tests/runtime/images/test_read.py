"""Every kind of picture in; oracles are Pillow's own conversions."""

from __future__ import annotations

import os
import struct
import threading
import warnings
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from support.pictures import CMYK_PROFILE, GREY_PROFILE, SRGB, chunk, message, noise, png, same_rgb, saved
from tilewright.runtime.errors import InputError
from tilewright.runtime.images.read import read_image

# Modes


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


# 16 bits


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


# Orientation, frames, profiles


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
    picture = read_image(path)
    assert np.array_equal(picture.rgb, pixels) and picture.exif is None


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


# Arrays


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


@pytest.mark.parametrize("thing", [None, 3, ["in.png"], object])
def test_other_objects_are_refused(thing: object) -> None:
    with pytest.raises(InputError, match=f"from a {type(thing).__name__}:") as error:
        read_image(thing)  # type: ignore[arg-type]
    assert "pass a path, bytes, a binary file" in message(error)


# Bytes and files


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, BytesIO])
def test_bytes_and_files_in_memory_are_read_as_the_file_is(tmp_path: Path, kind: Callable[[bytes], Any]) -> None:
    path = saved(tmp_path, Image.fromarray(noise(5, 7, 4)))
    picture, expected = read_image(kind(path.read_bytes())), read_image(path)
    assert np.array_equal(picture.rgb, expected.rgb) and np.array_equal(picture.alpha, expected.alpha)


def test_an_open_file_is_read_from_where_it_is_and_stays_open(tmp_path: Path) -> None:
    path = saved(tmp_path, Image.fromarray(noise(5, 7, 3)))
    (tmp_path / "two").write_bytes(b"head" + path.read_bytes())
    with (tmp_path / "two").open("rb") as file:
        file.seek(4)
        assert np.array_equal(read_image(file).rgb, read_image(path).rgb)
        assert not file.closed


def test_a_pipe_is_read_though_it_cannot_seek(tmp_path: Path) -> None:
    content = saved(tmp_path, Image.fromarray(noise(5, 7, 3))).read_bytes()
    reader, writer = os.pipe()
    os.write(writer, content)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        assert np.array_equal(read_image(file).rgb, read_image(content).rgb)


def test_bytes_that_are_no_image_are_refused() -> None:
    with pytest.raises(InputError, match=r"^the image is damaged or not an image"):
        read_image(b"in.png")
    with pytest.raises(InputError, match="over the limit of 34") as error:
        read_image(png(5, 7, depth=8, colour=0, rows=b"\0" * 42), max_pixels=34)
    assert message(error).startswith("the image is 5x7")


def test_a_file_that_gives_text_or_nothing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("words")
    with path.open() as file, pytest.raises(InputError, match=r"in\.txt reads as str: open it in binary mode, 'rb'"):
        read_image(file)  # type: ignore[arg-type]
    with path.open("rb") as closed:
        pass
    with pytest.raises(InputError, match=r"in\.txt cannot be read \(read of closed file\)"):
        read_image(closed)


# Sizes beyond a limit


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


@pytest.mark.parametrize(("name", "pillow_limit"), [*product(["in.png", "in.jpg", "in.gif"], [1, 15]), ("in.webp", 15)])
def test_pillows_own_limit_neither_warns_nor_refuses_nor_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, pillow_limit: int
) -> None:
    path, limits = saved(tmp_path, Image.new("RGB", (4, 5)), name), []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillow_limit)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        picture = read_image(path, check=lambda *size: limits.append(Image.MAX_IMAGE_PIXELS))
    assert picture.rgb.shape == (5, 4, 3)
    assert limits == [pillow_limit]  # during the read
    assert pillow_limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("name", ["in.webp", "in.tif"])
def test_a_reader_of_pillow_that_insists_on_the_limit_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = saved(tmp_path, Image.new("RGB", (4, 5)), name)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1)
    if int(PIL.__version__.partition(".")[0]) < 13:
        pytest.skip("this Pillow reads all sizes")
    with pytest.raises(InputError, match=r"over the limit of this process: set PIL\.Image\.MAX_IMAGE_PIXELS, now 1,"):
        read_image(path)


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


# Files that cannot be read


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
