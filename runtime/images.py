"""Image files and arrays in, canvases for the network, image files out.

Pillow keeps only the high byte of 16-bit colour and converts CMYK without its profile; 16-bit grey is rounded here.
Files are read in the formats of `_FORMATS` only: some of Pillow's other readers run programs or hide images of any
size inside a small one.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from tilewright.runtime.errors import InputError, ResourceError, UsageError

__all__ = ["Enlarged", "Picture", "assemble", "check_writable", "fill", "padded", "read", "write"]

Pixels = npt.NDArray[np.uint8]
Canvas = npt.NDArray[np.float32]

# The first five need no further plugins, and AVIF is last because a Pillow without it fails on reaching the name.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "TGA", "AVIF")
_GREY_MODES = ("1", "L", "LA", "La")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_REACH = 3  # source pixels on each side that decide an enlarged one; the bicubic filter reads 2
_BAND = 128  # rows: a float buffer of this many stays in cache, and small beside an image of any size

_guard = threading.Lock()
_reads = 0
_pillow_limit: int | None = None


@dataclass(frozen=True)
class Picture:
    """8-bit pixels that came from one image."""

    rgb: Pixels  # [H, W, 3]; may share memory with the array it was read from
    alpha: Pixels | None  # [H, W]
    grey: bool  # the source had no colour, so the result is written without colour
    icc: bytes | None  # only a profile that describes these pixels: a CMYK one is dropped


@dataclass(frozen=True)
class _Writer:
    """A Pillow encoder, its options, and what it cannot hold."""

    format: str
    options: Mapping[str, Any]
    grey: bool = True
    alpha: bool = True
    max_side: int = 2**31 - 1
    max_bytes: int = 2**63 - 1


_PNG = _Writer("PNG", {})
_JPEG = _Writer("JPEG", {"quality": 95, "subsampling": 0}, alpha=False, max_side=65500)  # libjpeg's, short of 65535
_WEBP = _Writer("WEBP", {"lossless": True, "exact": True}, grey=False, max_side=16383)
_TIFF = _Writer("TIFF", {}, max_bytes=2**32 - 2**20)  # offsets have 32 bits; the rest is for headers and a profile
_BMP = _Writer("BMP", {}, alpha=False, max_bytes=2**32 - 2**20)
_WRITERS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _WEBP,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _BMP,
}


def read(source: str | os.PathLike[str] | Image.Image | npt.NDArray[Any], *, max_pixels: int = 100_000_000) -> Picture:
    """Read a file, a Pillow image or a uint8 array, upright and in 8 bits; of an animated file, the first frame."""
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        _check_size("the image", source.size, max_pixels)
        return _from_image(source, "the image")
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), max_pixels)
    raise InputError(f"cannot read an image from a {type(source).__name__}: pass a path, a Pillow image or an array")


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Picture:
    wanted = "pass uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    if array.dtype != np.uint8:
        raise InputError(f"the array holds {array.dtype}: scale it to 0..255, round it and {wanted}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"the array has shape {list(array.shape)}: {wanted}")
    _check_size("the array", (array.shape[1], array.shape[0]), max_pixels)
    return _split(array, None)


def _from_file(path: Path, max_pixels: int) -> Picture:
    # Not by its name: Pillow would map the file, and so scramble an uncompressed TIFF that is stored on its side.
    with _opened(path) as file, _bomb_check_off(), _identified(file, path) as image:
        _check_size(str(path), image.size, max_pixels)
        return _from_image(image, str(path))


@contextmanager
def _bomb_check_off() -> Iterator[None]:
    """Lift Pillow's own size limit, which a caller of `read` cannot raise, until no read is left running."""
    global _reads, _pillow_limit
    with _guard:
        if _reads == 0:
            _pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        _reads += 1
    try:
        yield
    finally:
        with _guard:
            _reads -= 1
            if _reads == 0:
                Image.MAX_IMAGE_PIXELS = _pillow_limit


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened ({_reason(error)}): check the path") from error


def _identified(file: BinaryIO, path: Path) -> Image.Image:
    try:
        return Image.open(file, formats=_FORMATS)
    except Exception as error:  # Pillow's readers raise whatever a damaged header leads them to
        known = ", ".join(_FORMATS)
        raise InputError(f"{path} is damaged or not an image: pass one of the formats {known}") from error


def _reason(error: Exception) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def _check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if not width * height:
        raise InputError(f"{name} is {width}x{height} and has no pixels: pass one of at least 1x1")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height} pixels, over the limit of {max_pixels}: "
            "raise max_pixels to read it"
        )


def _from_image(image: Image.Image, name: str) -> Picture:
    try:
        image.load()
        return _split(_planes(_upright(image), name), image.info.get("icc_profile"))
    except (InputError, MemoryError):
        raise
    except Exception as error:  # Pillow's decoders raise whatever damaged data leads them to
        raise InputError(f"{name} cannot be decoded ({_reason(error)}): replace the damaged or cut file") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing against the pixels
        turn = None
    return image if turn is None else image.transpose(turn)


def _planes(image: Image.Image, name: str) -> Pixels:
    if image.mode == "F":
        raise InputError(f"{name} holds floating-point pixels (mode F): convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        return _rounded(np.asarray(image), image.info.get("transparency"), name)
    mode = ("L" if image.mode in _GREY_MODES else "RGB") + ("A" if image.has_transparency_data else "")
    return np.asarray(image if image.mode == mode else image.convert(mode))


def _rounded(values: npt.NDArray[Any], transparent: int | None, name: str) -> Pixels:
    if values.min() < 0 or values.max() > 65535:
        span = f"{values.min()}..{values.max()}"
        raise InputError(f"{name} holds integers {span}, beyond 16 bits: scale it to 0..65535 or to 8 bits")
    luma = ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if transparent is None:
        return luma
    return np.dstack((luma, np.where(values == transparent, 0, 255).astype(np.uint8)))


def _split(planes: Pixels, icc: bytes | None) -> Picture:
    planes = planes.reshape(*planes.shape[:2], -1)
    channels = planes.shape[2]
    has_alpha, grey = channels in (2, 4), channels < 3
    colour = planes[:, :, : channels - has_alpha]
    rgb = np.ascontiguousarray(np.broadcast_to(colour, (*planes.shape[:2], 3)))
    alpha = np.ascontiguousarray(planes[:, :, -1]) if has_alpha else None
    return Picture(rgb, alpha, grey, _fitting(icc, grey))


def _fitting(icc: bytes | None, grey: bool) -> bytes | None:
    """Keep a profile only if it is for pixels of this kind, which bytes 16 to 19 of it name."""
    return icc if icc and icc[16:20] == (b"GRAY" if grey else b"RGB ") else None


def _enlarged(pixels: Pixels, scale: int) -> Pixels:
    image = Image.fromarray(pixels)
    return np.asarray(image.resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC))


@dataclass(frozen=True)
class Enlarged:
    """A picture as a network sees it, enlarged and padded, made crop by crop: it never exists as a whole.

    The bottom and right are padded to the multiple: reflected, or the edge repeated if a side is too short.
    """

    rgb: Pixels
    scale: int
    multiple: int
    least: int = 1  # the shortest side of the padded picture

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, padded height, padded width."""
        height, width = (padded(side * self.scale, self.multiple, self.least) for side in self.rgb.shape[:2])
        return 3, height, width

    def crop(self, top: int, left: int, height: int, width: int) -> Canvas:
        """Planes in [0, 1]; the same values as if the whole were enlarged first."""
        rows = _source_rows(top, height, self.rgb.shape[0] * self.scale, self.shape[1])
        columns = _source_rows(left, width, self.rgb.shape[1] * self.scale, self.shape[2])
        first_row, last_row = self._support(rows)
        first_column, last_column = self._support(columns)
        pixels = self.rgb[first_row:last_row, first_column:last_column]
        pixels = pixels if self.scale == 1 else _enlarged(np.ascontiguousarray(pixels), self.scale)
        pixels = _taken(pixels, rows - first_row * self.scale, 0)
        pixels = _taken(pixels, columns - first_column * self.scale, 1)
        planes = np.empty((3, height, width), np.float32)
        for channel in range(3):
            np.divide(pixels[:, :, channel], 255, out=planes[channel], dtype=np.float32)
        return planes

    def _support(self, rows: npt.NDArray[np.int64]) -> tuple[int, int]:
        """The source rows that the filter reads for these enlarged ones; Pillow cuts what reaches past the image."""
        return max(0, int(rows.min()) // self.scale - _REACH), int(rows.max()) // self.scale + 1 + _REACH


def padded(side: int, multiple: int, least: int) -> int:
    """A side as it is padded: to the multiple, and to `least` at least."""
    return -(-max(side, least) // multiple) * multiple


def _source_rows(start: int, count: int, filled: int, padded: int) -> npt.NDArray[np.int64]:
    rows = np.arange(start, start + count)
    mirrored = 2 * (filled - 1) - rows if padded - filled <= filled - 1 else np.full_like(rows, filled - 1)
    return np.where(rows < filled, rows, mirrored)


def _taken(pixels: Pixels, rows: npt.NDArray[np.int64], axis: int) -> Pixels:
    """The rows as a view where they follow each other."""
    if rows[-1] - rows[0] == len(rows) - 1 and rows.max() == rows[-1]:
        span = slice(int(rows[0]), int(rows[-1]) + 1)
        return pixels[span] if axis == 0 else pixels[:, span]
    return np.take(pixels, rows, axis)


def fill(rgb: Pixels, start: int, left: int, canvas: Canvas) -> None:
    """Clamp planes to [0, 1], round them to 8 bits and put them there in a picture, cropped to it; NaN becomes 0."""
    height = max(0, min(canvas.shape[1], rgb.shape[0] - start))
    width = max(0, min(canvas.shape[2], rgb.shape[1] - left))
    buffer = np.empty((min(_BAND, height), width), np.float32)
    for top in range(0, height, _BAND):
        rows = slice(top, min(top + _BAND, height))
        values = buffer[: rows.stop - top]
        for channel in range(3):
            np.fmax(canvas[channel, rows, :width], 0, out=values)  # unlike maximum, not NaN where one side is
            np.minimum(values, 1, out=values)
            np.multiply(values, 255, out=values)
            np.add(values, 0.5, out=values)
            rgb[start + top : start + rows.stop, left : left + width, channel] = values


def assemble(rgb: Pixels, like: Picture) -> Pixels:
    """Lay out a result as its source was: [H, W], [H, W, 2], [H, W, 3] or [H, W, 4]; alpha is enlarged to fit."""
    colour = np.array(Image.fromarray(rgb).convert("L")) if like.grey else rgb
    if like.alpha is None:
        return colour
    alpha = Image.fromarray(like.alpha).resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BICUBIC)
    return np.dstack((colour, np.asarray(alpha)))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that `write` could not write to, before any work is done for it."""
    suffix = Path(path).suffix
    if suffix.lower() not in _WRITERS:
        raise UsageError(f"{path} has the suffix {suffix!r}, which no writer knows: use one of {', '.join(_WRITERS)}")
    target = Path(path).resolve()
    if target.is_dir():
        raise UsageError(f"{path} is a directory: name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{path} is in {target.parent}, which is not a directory: create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} is in {target.parent}, which is not writable: choose another directory")


def write(path: str | os.PathLike[str], pixels: Pixels, *, icc: bytes | None = None) -> None:
    """Write [H, W], [H, W, 2], [H, W, 3] or [H, W, 4] whole or not at all; JPEG and BMP drop the alpha."""
    check_writable(path)
    writer = _WRITERS[Path(path).suffix.lower()]
    pixels = pixels if writer.alpha else _without_alpha(pixels)
    _check_fits(path, pixels, writer)
    profile = _fitting(icc, writer.grey and (pixels.ndim == 2 or pixels.shape[2] == 2))
    try:
        _replace(Path(path).resolve(), Image.fromarray(pixels), writer, profile)
    except OSError as error:
        advice = "free space there or choose another path"
        raise ResourceError(f"{path} cannot be written ({_reason(error)}): {advice}") from error


def _without_alpha(pixels: Pixels) -> Pixels:
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels
    return pixels[:, :, 0] if pixels.shape[2] == 2 else pixels[:, :, :3]


def _check_fits(path: str | os.PathLike[str], pixels: Pixels, writer: _Writer) -> None:
    height, width = pixels.shape[:2]
    if max(height, width) > writer.max_side:
        limit = f"{writer.max_side} pixels a side"
    elif pixels.nbytes > writer.max_bytes:
        limit = f"{writer.max_bytes} bytes"
    else:
        return
    raise UsageError(f"{path} would be {width}x{height}, over {writer.format}'s limit of {limit}: use .png")


def _replace(target: Path, image: Image.Image, writer: _Writer, icc: bytes | None) -> None:
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x+b") as file:
            image.save(file, writer.format, icc_profile=icc, **writer.options)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
