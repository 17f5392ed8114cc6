"""Every kind of picture out, whole or not at all."""

from __future__ import annotations

import os
import shutil
import stat
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from support.pictures import CMYK_PROFILE, GREY_PROFILE, SRGB, filled, message, noise, whole
from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.images.write import (
    assemble,
    check_format,
    check_room,
    check_writable,
    encode_image,
    write_image,
    write_or_keep,
)

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


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_exif_of_a_photo_comes_back_without_what_the_result_makes_wrong(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make], exif[ExifTags.Base.Orientation] = "A Camera Maker", 6
    exif.get_ifd(ExifTags.IFD.Exif).update({ExifTags.Base.ExifImageWidth: 9, ExifTags.Base.LensMake: "A Lens Maker"})
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    Image.fromarray(noise(6, 9, 3)).save(tmp_path / "photo.jpg", exif=exif)
    picture = read_image(tmp_path / "photo.jpg")
    assert picture.rgb.shape == (9, 6, 3)
    write_image(tmp_path / f"out{suffix}", picture.rgb, exif=picture.exif)
    with Image.open(tmp_path / f"out{suffix}") as image:
        kept = image.getexif()
        if suffix in (".tif", ".bmp"):
            assert ExifTags.Base.Make not in kept
            return
        assert kept[ExifTags.Base.Make] == "A Camera Maker" and ExifTags.Base.Orientation not in kept
        assert kept.get_ifd(ExifTags.IFD.Exif) == {ExifTags.Base.LensMake: "A Lens Maker"}
        assert kept.get_ifd(ExifTags.IFD.GPSInfo) == {ExifTags.GPS.GPSLatitudeRef: "N"}


def test_exif_that_a_format_cannot_hold_is_left_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "A Camera Maker" * 5000
    write_image(tmp_path / "out.png", noise(4, 4, 3), exif=exif.tobytes())
    kept = read_image(tmp_path / "out.png").exif
    assert kept is not None and len(kept) > 2**16
    write_image(tmp_path / "out.jpg", noise(4, 4, 3), exif=kept)
    assert read_image(tmp_path / "out.jpg").exif is None


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_encoded_bytes_are_those_of_the_file(tmp_path: Path, suffix: str) -> None:
    pixels = noise(5, 7, 4)
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "A Camera Maker"
    beside = {"icc": SRGB, "exif": exif.tobytes()}
    write_image(tmp_path / f"out{suffix}", pixels, **beside)
    for name in (suffix, suffix[1:].upper()):
        assert encode_image(pixels, name, **beside) == (tmp_path / f"out{suffix}").read_bytes()
    assert encode_image(pixels) == encode_image(pixels, ".png")


def test_what_no_format_can_hold_is_not_encoded() -> None:
    with pytest.raises(UsageError, match=r"no writer knows the suffix '\.xyz': use one of \.png"):
        encode_image(noise(5, 7, 3), "xyz")
    with pytest.raises(UsageError, match="the image would be 16384x1, over WEBP's limit of 16383 pixels a side"):
        encode_image(np.zeros((1, 16384, 3), np.uint8), "webp")


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


# Room, and pictures that must not be lost


@pytest.mark.parametrize(
    ("suffix", "shape", "size"),
    [(".png", (3, 5), 15), (".png", (3, 5, 4), 60), (".jpg", (3, 5, 4), 45), (".bmp", (3, 5, 2), 15)],
)
def test_a_picture_takes_at_most_its_pixels_uncompressed(suffix: str, shape: tuple[int, ...], size: int) -> None:
    assert check_format("the image", suffix, shape) == size


def test_a_disk_with_less_room_than_the_pixels_take_is_refused(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    check_room(tmp_path / "out.png", (free // 2**20, 2**19))
    with pytest.raises(ResourceError, match=r"out.png takes up to .*B, and .*B are free there; free space"):
        check_room(tmp_path / "out.png", (free // 2**20, 2**21))


def test_a_picture_whose_folder_has_gone_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    pixels = noise(9, 7, 3)
    with pytest.raises(ResourceError, match=r"which is not a directory: create it first; the picture is kept as"):
        write_or_keep(tmp_path / "gone" / "out.png", pixels)
    (kept,) = tmp_path.iterdir()
    assert kept.name.startswith("out-") and np.array_equal(np.asarray(Image.open(kept)), pixels)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "no"))
    with pytest.raises(UsageError, match=r"create it first$"):
        write_or_keep(tmp_path / "gone" / "out.png", pixels)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_a_write_that_is_stopped_leaves_the_old_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(CancelledError):
        write_image(path, noise(200, 200, 3), stopped=lambda: True)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif", ".bmp"])
def test_the_share_of_a_large_picture_that_is_written_rises_to_about_one(tmp_path: Path, suffix: str) -> None:
    pixels = np.repeat(noise(2900, 1, 1, seed=3), 2900, 1)[:, :, 0]
    pixels[::3, ::2] = noise(967, 1450, 1, seed=4)[:, :, 0]
    shares: list[float] = []
    write_image(tmp_path / f"out{suffix}", pixels, on_share=shares.append)
    assert shares == sorted(shares) and len(shares) > 10
    assert shares[0] < 0.05 and 0.9 < shares[-1] <= 1
    assert (tmp_path / f"out{suffix}").read_bytes() == encode_image(pixels, suffix)
    told: list[float] = []
    assert encode_image(pixels, suffix, on_share=told.append) == encode_image(pixels, suffix)
    assert told == shares


def test_a_picture_that_is_soon_written_tells_no_share(tmp_path: Path) -> None:
    shares: list[float] = []
    write_image(tmp_path / "out.png", noise(100, 100, 3), on_share=shares.append)
    assert not shares
