"""Writing image files, completely or not at all."""

from __future__ import annotations

import io
import math
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.errors import ResourceError, UsageError, amount
from tilewright.runtime.images.canvas import Stored, enlarged_rows
from tilewright.runtime.images.on_disk import PixelFile
from tilewright.runtime.images.read import Picture, Pixels, fitting_profile, reason
from tilewright.runtime.images.vips import write_large

__all__ = [
    "FORMATS",
    "PictureOnDisk",
    "assemble",
    "check_format",
    "check_overwrite",
    "check_place",
    "check_room",
    "check_writable",
    "encode_image",
    "write_image",
    "write_or_keep",
]


@dataclass(frozen=True)
class _Writer:
    """A Pillow encoder, its options and its limits."""

    format: str
    options: Mapping[str, Any]
    grey: bool = True
    alpha: bool = True
    max_side: int = 2**31 - 1
    max_bytes: int = 2**63 - 1
    max_exif: int = 2**31 - 1  # bytes; 0: none is written, as of pictures on the disk


_PNG = _Writer("PNG", {})
_JPEG = _Writer(
    "JPEG",
    {"quality": 95, "subsampling": 0},
    alpha=False,
    max_side=65500,  # libjpeg's, short of 65535
    max_exif=2**16 - 3,
)
_WEBP = _Writer("WEBP", {"lossless": True, "exact": True}, grey=False, max_side=16383)
_TIFF = _Writer(
    "TIFF", {}, max_bytes=2**32 - 2**20, max_exif=0
)  # offsets have 32 bits; the rest is for headers and a profile
_BMP = _Writer("BMP", {}, alpha=False, max_bytes=2**32 - 2**20, max_exif=0)
_WRITERS = {
    ".png": _PNG,
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": _WEBP,
    ".tif": _TIFF,
    ".tiff": _TIFF,
    ".bmp": _BMP,
}
LARGE_PX = 1 << 23  # smaller pictures are written in a second or two
BANDS, BAND_PX = 8, 16  # rows of a picture that are encoded first, to estimate the size of its file
OnShare = Callable[[float], None]
FORMATS = tuple(suffix[1:] for suffix in _WRITERS)


@dataclass(frozen=True)
class PictureOnDisk:
    """A result [H, W, C] whose pixels lie in a file. `write_image` writes it, strip by strip."""

    rgb: Stored
    like: Picture  # the source
    scale: int
    file: PixelFile

    @property
    def dtype(self) -> Any:
        """Unsigned integers of 8 or 16 bits."""
        return self.file.dtype

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return (*self.rgb.shape[:2], (1 if self.like.grey else 3) + (self.like.alpha is not None))  # type: ignore[return-value]

    def rows(self, top: int, bottom: int) -> npt.NDArray[Any]:
        """Some rows, with the layout of the source."""
        pixels = self.rgb[top:bottom, 0 : self.rgb.shape[1]]
        if self.like.grey:
            pixels = _grey(pixels)[:, :, None]
        if self.like.alpha is None:
            return pixels
        alpha = enlarged_rows(self.like.alpha, self.scale, top, bottom)
        most = int(np.iinfo(self.dtype).max)
        if alpha.dtype == np.float32:
            alpha = (alpha * most + np.float32(0.5)).astype(self.dtype)
        return np.dstack((pixels, alpha.astype(self.dtype) * (1 if alpha.dtype == self.dtype else most // 255)))

    def close(self) -> None:
        """Remove the file with the pixels. `Ticket.keeping` does that, too."""
        self.file.close(remove=True)


def _grey(rgb: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The grey that Pillow makes of colours, also of those with 16 bits."""
    red, green, blue = (rgb[:, :, channel].astype(np.uint32) for channel in range(3))
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16).astype(rgb.dtype)


def assemble(rgb: Pixels, like: Picture) -> Pixels:
    """A result with the layout of its source: [H, W], [H, W, 2], [H, W, 3] or [H, W, 4]; alpha is enlarged."""
    colour = np.array(Image.fromarray(rgb).convert("L")) if like.grey else rgb
    if like.alpha is None:
        return colour
    alpha = Image.fromarray(like.alpha).resize((rgb.shape[1], rgb.shape[0]), Image.Resampling.BICUBIC)
    return np.dstack((colour, np.asarray(alpha)))


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that cannot be written to, before any work is done for it."""
    suffix = Path(path).suffix
    if suffix.lower() not in _WRITERS and not Path(path).is_dir():
        raise UsageError(f"{path} has the suffix {suffix!r}, which no writer knows: use one of {', '.join(_WRITERS)}")
    check_place(path)


def check_place(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to."""
    target = Path(path).resolve()
    if target.is_dir():
        raise UsageError(f"{path} is a directory: name a file")
    if target.exists() and not target.is_file():
        raise UsageError(f"{path} is a device or a pipe: name a file")
    if not target.parent.is_dir():
        raise UsageError(f"{path} is in {target.parent}, which is not a directory: create it first")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path} is in {target.parent}, which is not writable: choose another directory")


def check_overwrite(path: str | os.PathLike[str], source: str | os.PathLike[str]) -> None:
    """Refuse to overwrite the input image or a read-only file."""
    target = Path(path)
    if not target.exists():
        return
    if Path(source).exists() and target.samefile(source):
        raise UsageError(f"{path} is the input itself: name another file, or replace it with --force")
    if not target.stat().st_mode & 0o222:
        raise UsageError(f"{path} is read-only: name another file, or replace it with --force")


def check_format(name: str, suffix: str, shape: Sequence[int]) -> int:
    """Refuse pixels of this shape if the format of the suffix cannot hold them; their size in bytes."""
    writer = _WRITERS[suffix.lower()]
    height, width, *channels = shape
    held = [height, width, *(n - (n in (2, 4) and not writer.alpha) for n in channels)]
    if max(height, width) > writer.max_side:
        limit = f"{writer.max_side} pixels a side"
    elif math.prod(held) > writer.max_bytes:
        limit = f"{writer.max_bytes} bytes"
    else:
        return math.prod(held)
    raise UsageError(f"{name} would be {width}x{height}, over {writer.format}'s limit of {limit}: use .png")


def check_room(path: str | os.PathLike[str], shape: Sequence[int]) -> None:
    """Refuse a picture that its format or its disk cannot hold, before any work. The disk must hold it uncompressed."""
    size = check_format(str(path), Path(path).suffix, shape)
    free = shutil.disk_usage(Path(path).resolve().parent).free
    if size > free:
        raise ResourceError(
            f"{path} takes up to {amount(size)}, and {amount(free)} are free there; free space, or choose another place"
        )


def write_or_keep(
    path: str | os.PathLike[str],
    pixels: Pixels | PictureOnDisk,
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_share: OnShare | None = None,
) -> None:
    """Write an image as `write_image` does. If that fails, keep it in the temporary folder; the error says where.

    One that lies on the disk stays there.
    """
    try:
        write_image(path, pixels, icc=icc, exif=exif, stopped=stopped, on_share=on_share)
    except (ResourceError, UsageError) as error:
        if isinstance(pixels, PictureOnDisk):
            raise
        try:
            name = f"{Path(path).stem}-{secrets.token_hex(4)}{Path(path).suffix}"
            kept = Path(tempfile.gettempdir()) / name
            write_image(kept, pixels, icc=icc, exif=exif, stopped=stopped, on_share=on_share)
        except (ResourceError, UsageError, OSError):
            raise error from None
        elsewhere = ResourceError(f"{error}; the picture is kept as {kept}")
        elsewhere.picture = kept
        raise elsewhere from error


def write_image(
    path: str | os.PathLike[str],
    pixels: Pixels | PictureOnDisk,
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    stopped: Callable[[], bool] = lambda: False,
    on_share: OnShare | None = None,
) -> None:
    """Write [H, W], [H, W, 2], [H, W, 3] or [H, W, 4], completely or not at all. JPEG and BMP drop alpha.

    The write ends with CancelledError soon after `stopped` is true. `on_share` gets the share of a large file that is
    written, by an estimate of its size.
    """
    check_writable(path)
    if isinstance(pixels, PictureOnDisk):
        write_large(
            path, pixels.shape, pixels.dtype, pixels.rows, kept=pixels.like.kept, stopped=stopped, on_share=on_share
        )
        return
    image, writer, extras = _prepared(str(path), Path(path).suffix.lower(), pixels, icc, exif)
    try:
        with (
            writing(Path(path).resolve()) as temporary,
            _File(temporary, stopped, _shares(image, writer, on_share)) as file,
        ):
            image.save(file, writer.format, **extras, **writer.options)
    except OSError as error:
        advice = "free space there or choose another path"
        raise ResourceError(f"{path} cannot be written ({reason(error)}): {advice}") from error


def encode_image(
    pixels: Pixels,
    suffix: str = ".png",
    *,
    icc: bytes | None = None,
    exif: bytes | None = None,
    on_share: OnShare | None = None,
) -> bytes:
    """The bytes that `write_image` would write to a file with this suffix: .png, .jpg, .webp, .tif, .bmp."""
    suffix = f".{suffix.lower().removeprefix('.')}"
    if suffix not in _WRITERS:
        raise UsageError(f"no writer knows the suffix {suffix!r}: use one of {', '.join(_WRITERS)}")
    image, writer, extras = _prepared("the image", suffix, pixels, icc, exif)
    file = _Bytes(_shares(image, writer, on_share))
    image.save(file, writer.format, **extras, **writer.options)
    return file.getvalue()


def _prepared(
    name: str, suffix: str, pixels: Pixels, icc: bytes | None, exif: bytes | None
) -> tuple[Image.Image, _Writer, dict[str, Any]]:
    """The encoder for a suffix, and the parts of an image that its format can hold: pixels, and what lies beside."""
    writer = _WRITERS[suffix]
    check_format(name, suffix, pixels.shape)
    pixels = pixels if writer.alpha else _without_alpha(pixels)
    grey = writer.grey and (pixels.ndim == 2 or pixels.shape[2] == 2)
    extras: dict[str, Any] = {"icc_profile": fitting_profile(icc, grey)}
    if exif and len(exif) <= writer.max_exif:
        extras["exif"] = exif
    return Image.fromarray(pixels), writer, extras


def _without_alpha(pixels: Pixels) -> Pixels:
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels
    return pixels[:, :, 0] if pixels.shape[2] == 2 else pixels[:, :, :3]


def _shares(image: Image.Image, writer: _Writer, on_share: OnShare | None) -> Callable[[int], None]:
    """A function to call with the size of each block of an encoded file, which tells the share that is written."""
    if on_share is None or image.width * image.height < LARGE_PX:
        return lambda size: None
    tops = (
        [(image.height - BAND_PX) * i // (BANDS - 1) for i in range(BANDS)] if image.height > BANDS * BAND_PX else [0]
    )
    sample = Image.new(image.mode, (image.width, min(image.height, len(tops) * BAND_PX)))
    for i, top in enumerate(tops):
        sample.paste(image.crop((0, top, image.width, min(image.height, top + BAND_PX))), (0, i * BAND_PX))
    encoded = io.BytesIO()
    sample.save(encoded, writer.format, **writer.options)
    expected, written = len(encoded.getvalue()) * image.height / sample.height, 0

    def wrote(size: int) -> None:
        nonlocal written
        written += size
        on_share(min(1.0, written / expected))

    return wrote


class _Bytes(io.BytesIO):
    """A file in memory whose writes are told."""

    def __init__(self, wrote: Callable[[int], None]) -> None:
        super().__init__()
        self.wrote = wrote

    def write(self, data: Any) -> int:
        self.wrote(len(data))
        return super().write(data)


class _File(io.BufferedRandom):
    """An empty file whose writes are told and can be stopped. Without `fileno` Pillow hands every block to `write`."""

    def __init__(self, path: Path, stopped: Callable[[], bool], wrote: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "r+b"))
        self.stopped, self.wrote = stopped, wrote

    def write(self, data: Any) -> int:
        if self.stopped():
            raise CancelledError
        self.wrote(len(data))
        return super().write(data)

    def fileno(self) -> int:
        raise io.UnsupportedOperation
