"""Reading image files and arrays.

Pillow keeps only the high byte of 16-bit colour and converts CMYK without its profile; 16-bit grey is rounded here.
Only the formats in `_FORMATS` are read: some of Pillow's other readers run programs, or hide large images in small
files.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image

from tilewright.runtime.errors import InputError

__all__ = [
    "SUFFIXES",
    "Picture",
    "Pixels",
    "check_size",
    "fitting_profile",
    "image_size",
    "opened_image",
    "read_image",
    "reason",
]

Pixels = npt.NDArray[np.uint8]
Source: TypeAlias = (
    "str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | Image.Image | npt.NDArray[Any]"
)


# The first five need no further plugins; a Pillow may lack the last.
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "WEBP", "TIFF", "JPEG2000", "TGA", "AVIF")


# of files in these formats; a folder's other files are no images
# fmt: off
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".pbm", ".pgm", ".ppm",
    ".pnm", ".webp", ".tif", ".tiff", ".jp2", ".j2k", ".jpx", ".j2c", ".tga", ".avif", ".avifs",
)
# fmt: on


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


@dataclass(frozen=True)
class Picture:
    """The pixels of an image: 8 bits in memory, or 8 or 16 bits in a file, where `Stored` reads them by rectangles."""

    rgb: Any  # [H, W, 3]; may share memory with the array it was read from
    alpha: Any  # [H, W], [H, W, 1] in a file, or none
    grey: bool  # the source had no colour, so the result is written without colour
    icc: bytes | None  # only a profile that describes these pixels: a CMYK one is dropped
    exif: bytes | None = None  # without what an upright picture of another size makes wrong
    kept: Mapping[str, Any] = field(default_factory=dict)  # what else was beside the pixels, for `write_large`


def read_image(
    source: Source, *, max_pixels: int = 100_000_000, check: Callable[[int, int], None] = lambda width, height: None
) -> Picture:
    """Read an image upright and in 8 bits. An animated file gives its first frame.

    `source` is a path, the bytes of a file, a binary file (a pipe too), a Pillow image or a uint8 array. `check` gets
    the size of a file's picture, as it is stored, before the file is decoded; what it raises ends the read.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, max_pixels)
    if isinstance(source, Image.Image):
        check_size("the image", source.size, max_pixels)
        return _from_image(source, "the image")
    if isinstance(source, (str, os.PathLike)):
        return _from_file(Path(source), max_pixels, check)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_bytes(BytesIO(source), "the image", max_pixels, check)
    if callable(getattr(source, "read", None)):
        name = str(getattr(source, "name", "the image"))
        return _from_bytes(BytesIO(_read_all(source)), name, max_pixels, check)
    takes = "a path, bytes, a binary file, a Pillow image or an array"
    raise InputError(f"cannot read an image from a {type(source).__name__}: pass {takes}")


def _from_array(array: npt.NDArray[Any], max_pixels: int) -> Picture:
    accepted = "pass uint8 [H, W], [H, W, 1], [H, W, 3] or [H, W, 4]"
    if array.dtype != np.uint8:
        raise InputError(f"the array holds {array.dtype}: scale it to 0..255, round it and {accepted}")
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        raise InputError(f"the array has shape {list(array.shape)}: {accepted}")
    check_size("the array", (array.shape[1], array.shape[0]), max_pixels)
    return _split(array, None)


def image_size(source: Path | BinaryIO) -> tuple[int, int]:
    """The width and the height of an image file, from its header."""
    if not isinstance(source, Path):
        with _identified(source, "the image") as image:
            return image.size
    with opened_image(source) as file, _identified(file, str(source)) as image:
        return image.size


def _from_file(path: Path, max_pixels: int, check: Callable[[int, int], None]) -> Picture:
    # Not by its name: Pillow would map the file, and so scramble an uncompressed TIFF that is stored on its side.
    with opened_image(path) as file:
        return _from_bytes(file, str(path), max_pixels, check)


def _from_bytes(file: BinaryIO, name: str, max_pixels: int, check: Callable[[int, int], None]) -> Picture:
    with _identified(file, name) as image:
        check_size(name, image.size, max_pixels)
        check(*image.size)
        return _from_image(image, name)


def _read_all(file: BinaryIO) -> bytes:
    """Read a file from its current position to its end: Pillow would seek, which a pipe cannot do."""
    name = getattr(file, "name", "the image")
    try:
        content = file.read()
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read ({reason(error)}): check the file") from error
    if not isinstance(content, bytes):
        raise InputError(f"{name} reads as {type(content).__name__}: open it in binary mode, 'rb'")
    return content


def opened_image(path: Path) -> BinaryIO:
    """An image's file, opened to read; a pipe or a device is refused."""
    try:
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # opening a pipe waits for its other end
            raise InputError(f"{path} is a device or a pipe, not a file: name a file, or - for standard input")
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be opened ({reason(error)}): check the path") from error


def _identified(file: BinaryIO, name: str) -> Image.Image:
    """The image in a file. `Image.open` would also apply Pillow's own limit of pixels, which is the host process's."""
    formats = ", ".join(_FORMATS)
    refusal = f"{name} is damaged or not an image: pass one of the formats {formats}"
    try:
        Image.preinit()
        start = file.read(16)
        for kind in _FORMATS:
            if kind not in Image.OPEN:
                Image.init()
            reads, accepts = Image.OPEN.get(kind, (None, None))
            accepted = accepts(start) if accepts else True  # a text says why not
            if reads and accepted and not isinstance(accepted, str):
                file.seek(0)
                with suppress(SyntaxError, IndexError, TypeError, struct.error):  # another format begins alike
                    return reads(file, "")
    except Image.DecompressionBombError as error:
        raise _over_pillows_limit(name) from error
    except Exception as error:  # damaged headers cause errors of any type
        raise InputError(refusal) from error
    raise InputError(refusal)


def _over_pillows_limit(name: str) -> InputError:
    limit = Image.MAX_IMAGE_PIXELS
    return InputError(f"{name} is over the limit of this process: set PIL.Image.MAX_IMAGE_PIXELS, now {limit}, higher")


def reason(error: Exception) -> str:
    """What an error says, in one line."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())


def check_size(name: str, size: tuple[int, int], max_pixels: int) -> None:
    """Refuse a picture without pixels, or with too many."""
    width, height = size
    if not width * height:
        raise InputError(f"{name} is {width}x{height} and has no pixels: pass one of at least 1x1")
    if width * height > max_pixels:
        raise InputError(
            f"{name} is {width}x{height} = {width * height} pixels, over the limit of {max_pixels}: "
            f"read it with max_pixels={width * height}"
        )


def _from_image(image: Image.Image, name: str) -> Picture:
    try:
        image.load()
        picture = _split(_planes(_upright(image), name), image.info.get("icc_profile"))
        return replace(picture, exif=_exif_of(image))
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _over_pillows_limit(name) from error
    except Exception as error:  # damaged data causes errors of any type
        raise InputError(f"{name} cannot be decoded ({reason(error)}): replace the damaged or cut file") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # pixels may be intact although the EXIF block is damaged
        turn = None
    return image if turn is None else image.transpose(turn)


def _exif_of(image: Image.Image) -> bytes | None:
    """The EXIF block of an image, without the thumbnail, the orientation and the size; none if it is damaged."""
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        exif.pop(ExifTags.Base.Orientation, None)
        for tag in (ExifTags.Base.ExifImageWidth, ExifTags.Base.ExifImageHeight):
            exif.get_ifd(ExifTags.IFD.Exif).pop(tag, None)
        return exif.tobytes() if exif else None
    except Exception:  # as above
        return None


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
    return Picture(rgb, alpha, grey, fitting_profile(icc, grey))


def fitting_profile(icc: bytes | None, grey: bool) -> bytes | None:
    """The profile, if it is for pixels of this kind, which its bytes 16 to 19 name."""
    return icc if icc and icc[16:20] == (b"GRAY" if grey else b"RGB ") else None
