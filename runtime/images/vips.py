"""Images larger than memory: decoded into a file of pixels, and encoded from one, strip by strip.

It needs pyvips, which the extra `large` installs. libvips reads our strips from an uncompressed BigTIFF that exists
only while it is read.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.errors import EnvironmentMismatch, InputError, ResourceError, UsageError
from tilewright.runtime.images.on_disk import Channels, PixelFile
from tilewright.runtime.images.read import Picture, check_size, fitting_profile, opened_image, reason

__all__ = ["BITS", "check_large_format", "installed", "read_large", "write_large"]

BITS = {8: np.dtype(np.uint8), 16: np.dtype(np.uint16)}
BAND = 128  # rows of a strip
STARTS = {  # how files begin -> libvips' reader
    b"\x89PNG": "pngload_source",
    b"\xff\xd8\xff": "jpegload_source",
    b"II*\0": "tiffload_source",
    b"MM\0*": "tiffload_source",
    b"II+\0": "tiffload_source",
    b"MM\0+": "tiffload_source",
    b"RIFF": "webpload_source",
}
COLOURS = ("b-w", "grey16", "srgb", "rgb16", "rgb")
KEPT = ("exif-", "xmp-data", "iptc-data", "icc-profile-data")  # what a result keeps beside its pixels
# orientation of EXIF -> whether rows and columns change places, then which of the two are reversed
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
TIFF = {"tile": True, "tile_width": 256, "tile_height": 256, "compression": "deflate", "predictor": "horizontal"}
# suffix -> libvips' writer, its options, the longest side, the bits that it can write
WRITERS: dict[str, tuple[str, dict[str, Any], int, tuple[int, ...]]] = {
    ".png": ("pngsave", {}, 2**31 - 1, (8, 16)),
    ".jpg": ("jpegsave", {"Q": 95, "subsample_mode": "off"}, 65500, (8,)),
    ".jpeg": ("jpegsave", {"Q": 95, "subsample_mode": "off"}, 65500, (8,)),
    ".webp": ("webpsave", {"lossless": True, "exact": True}, 16383, (8,)),
    ".tif": ("tiffsave", TIFF, 2**31 - 1, (8, 16)),
    ".tiff": ("tiffsave", TIFF, 2**31 - 1, (8, 16)),
}
CLASSIC = 2**32 - 2**24  # more bytes need a BigTIFF, which fewer programs read


def installed() -> bool:
    """Whether pyvips is there. It is not loaded."""
    return find_spec("pyvips") is not None


@lru_cache(1)
def _library() -> Any:
    os.environ.setdefault("VIPS_WARNING", "1")  # otherwise libvips writes its warnings to stderr
    try:
        import pyvips
    except Exception as error:  # without libvips it raises errors of several types
        raise EnvironmentMismatch(
            f"images larger than memory need pyvips ({reason(error)}); pip install 'tilewright[large]'"
        ) from error
    logging.getLogger("pyvips").addHandler(logging.NullHandler())  # otherwise Python writes them there, too
    pyvips.cache_set_max(0)
    return pyvips


def check_large_format(path: str | os.PathLike[str], shape: Sequence[int], bits: int) -> None:
    """Refuse a result of this shape and depth if the format of its suffix cannot hold it."""
    suffix, (height, width) = Path(path).suffix.lower(), shape[:2]
    if suffix not in WRITERS:
        raise UsageError(f"{path}: pictures on the disk are written as {', '.join(WRITERS)}; use one of these suffixes")
    _, _, side, depths = WRITERS[suffix]
    if max(height, width) > side:
        raise UsageError(f"{path} would be {width}x{height}, over the format's limit of {side} pixels a side: use .tif")
    if bits not in depths:
        raise UsageError(f"bits={bits}: {suffix} holds 8 bits a channel; use .png or .tif, or bits=8")


def read_large(
    path: Path, folder: Path, *, bits: int, max_pixels: int, check: Callable[[int, int], None], memory: int | None
) -> Picture:
    """Read an image upright into a file of pixels without a name in `folder`.

    `bits`: 8 reduces an image of 16 bits as `read_image` does, 16 keeps them. `check` as for `read_image`. `memory`:
    bytes that the process may take; a format that must be decoded in one piece must fit.
    """
    pyvips, name = _library(), str(path)
    with opened_image(path) as file:
        start = file.read(4)
        reader = STARTS.get(start) or STARTS.get(start[:3])
        if reader is None:
            raise InputError(
                f"{name} is damaged, or of a format that is not read strip by strip: pass PNG, JPEG, TIFF or WebP"
            )
        file.seek(0)
        try:
            source = pyvips.Source.new_from_descriptor(file.fileno())
            image = getattr(pyvips.Image, reader)(source, access="sequential", fail_on="error")
        except pyvips.Error as error:
            raise InputError(f"{name} cannot be decoded ({_text(error)}): replace the damaged or cut file") from error
        check_size(name, (image.width, image.height), max_pixels)
        if image.interpretation not in COLOURS or image.format not in ("uchar", "ushort") or image.bands > 4:
            raise InputError(
                f"{name} holds {image.bands} channels of {image.format}, {image.interpretation}: convert it to RGB or"
                " grey of 8 or 16 bits"
            )
        decoded = image.width * image.height * image.bands * (2 if image.format == "ushort" else 1)
        whole = reader == "webpload_source" or _field(image, "interlaced")
        if whole and memory is not None and 4 * decoded > memory:
            raise InputError(
                f"{name} can only be decoded as a whole, in memory (interlaced, progressive or WebP): convert it to"
                " TIFF, or to PNG or JPEG that is not interlaced"
            )
        check(image.width, image.height)
        pixels = _decoded(pyvips, image, name, folder, bits)
        orientation = _field(image, "orientation")
        if orientation in TURNS:
            with pixels:
                pixels = _turned(pixels, *TURNS[orientation], folder)
        channels, icc = image.bands, _field(image, "icc-profile-data")
        kept = {n: (image.get_typeof(n), image.get(n)) for n in image.get_fields() if n.startswith(KEPT)}
        resolution = (image.xres, image.yres)
    grey, has_alpha = channels < 3, channels in (2, 4)
    rgb = Channels(pixels, (0, 0, 0) if grey else (0, 1, 2))
    alpha = Channels(pixels, (channels - 1,)) if has_alpha else None
    icc = fitting_profile(icc, grey)
    kept = {n: value for n, value in kept.items() if _stays(n, icc)}
    return Picture(rgb, alpha, grey, icc, kept=kept | {"resolution": resolution})


def _field(image: Any, name: str) -> Any:
    return image.get(name) if image.get_typeof(name) else None


def _stays(name: str, icc: bytes | None) -> bool:
    """Whether a field of the source fits its result: the result is upright, and a thumbnail would show the source."""
    if name == "icc-profile-data":
        return icc is not None
    return "Orientation" not in name and "thumbnail" not in name


def _decoded(pyvips: Any, image: Any, name: str, folder: Path, bits: int) -> PixelFile:
    """The pixels of an image as they are stored."""
    deep = image.format == "ushort"
    dtype = BITS[16 if deep and bits == 16 else 8]
    pixels = PixelFile(None, (image.height, image.width, image.bands), dtype, folder=folder)
    region = pyvips.Region.new(image)
    for top in range(0, image.height, BAND):
        rows = min(BAND, image.height - top)
        try:
            data = region.fetch(0, top, image.width, rows)
        except pyvips.Error as error:
            raise InputError(f"{name} cannot be decoded ({_text(error)}): replace the damaged or cut file") from error
        band: Any = np.frombuffer(data, np.uint16 if deep else np.uint8).reshape(rows, image.width, image.bands)
        if deep and bits == 8:  # as Pillow makes them
            band = (band >> 8 if image.bands > 1 else (band.astype(np.uint32) + 128) // 257).astype(np.uint8)
        pixels[top : top + rows, 0 : image.width] = band
    return pixels


def _turned(pixels: PixelFile, swaps: bool, down: bool, across: bool, folder: Path) -> PixelFile:
    """The pixels upright, in a file of their own."""
    height, width, channels = pixels.shape
    shape = (width, height, channels) if swaps else pixels.shape
    turned = PixelFile(None, shape, pixels.dtype, folder=folder)
    for top in range(0, shape[0], BAND):
        bottom = min(top + BAND, shape[0])
        first, last = (shape[0] - bottom, shape[0] - top) if down else (top, bottom)
        band = pixels[0:height, first:last].transpose(1, 0, 2) if swaps else pixels[first:last, 0:width]
        turned[top:bottom, 0 : shape[1]] = band[:: -1 if down else 1, :: -1 if across else 1]
    return turned


def write_large(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    dtype: Any,
    rows: Callable[[int, int], npt.NDArray[Any]],
    *,
    kept: Mapping[str, Any],
    stopped: Callable[[], bool] = lambda: False,
    on_share: Callable[[float], None] | None = None,
) -> None:
    """Write an image whose rows a function gives, strip by strip, completely or not at all.

    `shape`: height, width, channels: grey or RGB, and alpha last. `kept`: what `read_large` found beside the pixels.
    """
    pyvips, suffix = _library(), Path(path).suffix.lower()
    writer, options, _, _ = WRITERS[suffix]
    height, width, channels = shape
    if writer == "tiffsave":
        options = options | {"bigtiff": height * width * channels * np.dtype(dtype).itemsize > CLASSIC}
    if writer == "jpegsave" and channels in (2, 4):
        colour, channels = rows, channels - 1
        rows = lambda top, bottom: colour(top, bottom)[:, :, :channels]  # noqa: E731
    strips = _Strips((height, width, channels), np.dtype(dtype), rows, stopped, on_share)
    try:
        with writing(Path(path).resolve()) as temporary:
            try:
                source = pyvips.SourceCustom()
                source.on_read(strips.read)
                source.on_seek(strips.seek)
                image = pyvips.Image.tiffload_source(source, access="sequential", fail_on="error")
                getattr(_with_fields(pyvips, image, kept), writer)(str(temporary), **options)
            except pyvips.Error as error:
                if strips.error:
                    raise strips.error from None
                raise OSError(_text(error)) from error
    except OSError as error:
        advice = "free space there or choose another path"
        raise ResourceError(f"{path} cannot be written ({reason(error)}): {advice}") from error


def _with_fields(pyvips: Any, image: Any, kept: Mapping[str, Any]) -> Any:
    """An image with what its source had beside the pixels."""
    fields = dict(kept)
    xres, yres = fields.pop("resolution", (image.xres, image.yres))
    image = image.copy(xres=xres, yres=yres)
    for name, (kind, value) in fields.items():
        image.set_type(kind, name, value)
    image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    return image


class _Strips:
    """An uncompressed BigTIFF as a file that can be read. Each strip is made when it is first read."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: np.dtype[Any],
        rows: Callable[[int, int], npt.NDArray[Any]],
        stopped: Callable[[], bool],
        on_share: Callable[[float], None] | None,
    ) -> None:
        self.height, self.width, self.channels = shape
        self.rows, self.stopped, self.on_share = rows, stopped, on_share or (lambda share: None)
        self.at, self.strip, self.bytes = 0, -1, memoryview(b"")
        self.error: BaseException | None = None
        count = -(-self.height // BAND)
        self.row_bytes = self.width * self.channels * dtype.itemsize
        sizes = [self.row_bytes * (min(BAND, self.height - i * BAND)) for i in range(count)]
        bits, colours = 8 * dtype.itemsize, self.channels - (self.channels in (2, 4))
        tags: list[tuple[int, str, list[int]]] = [  # number, type, values
            (256, "L", [self.width]),
            (257, "L", [self.height]),
            (258, "H", [bits] * self.channels),
            (259, "H", [1]),  # not compressed
            (262, "H", [2 if colours == 3 else 1]),
            (273, "Q", [0] * count),  # where strips lie; filled in below
            (277, "H", [self.channels]),
            (278, "L", [BAND]),
            (279, "Q", sizes),
            (284, "H", [1]),  # channels side by side
        ]
        if self.channels > colours:
            tags.append((338, "H", [2]))  # alpha that the colours are not multiplied by
        arrays = 16 + 8 + 20 * len(tags) + 8
        self.start = arrays + sum(8 * len(v) for _, kind, v in tags if kind == "Q" and len(v) > 1)
        tags[5] = (273, "Q", [self.start + i * BAND * self.row_bytes for i in range(count)])
        head, tail = struct.pack("<2sHHHQQ", b"II", 43, 8, 0, 16, len(tags)), b""
        for number, kind, values in tags:
            data = struct.pack(f"<{len(values)}{kind}", *values)
            if len(data) > 8:
                data, tail = struct.pack("<Q", arrays + len(tail)), tail + data
            head += struct.pack("<HHQ", number, {"H": 3, "L": 4, "Q": 16}[kind], len(values)) + data.ljust(8, b"\0")
        self.head = memoryview(head + struct.pack("<Q", 0) + tail)
        self.end = self.start + self.height * self.row_bytes

    def read(self, size: int) -> bytes:
        """At most so many bytes from where it is. After an error it is empty, and `error` says why."""
        try:
            data = bytes(self._piece()[:size])
        except BaseException as error:  # it cannot pass through libvips
            self.error = self.error or error
            return b""
        self.at += len(data)
        return data

    def seek(self, offset: int, whence: int) -> int:
        """Go to a place."""
        self.at = offset + (0, self.at, self.end)[whence]
        return self.at

    def _piece(self) -> memoryview:
        if self.at < self.start:
            return self.head[self.at :]
        if self.at >= self.end:
            return self.head[:0]
        strip, inside = divmod(self.at - self.start, BAND * self.row_bytes)
        if strip != self.strip:
            if self.stopped():
                raise CancelledError
            top, bottom = strip * BAND, min(self.height, (strip + 1) * BAND)
            pixels = np.ascontiguousarray(self.rows(top, bottom))
            self.strip, self.bytes = strip, pixels.reshape(-1).view(np.uint8).data
            self.on_share(bottom / self.height)
        return self.bytes[inside:]


def _text(error: Exception) -> str:
    """The first line of what libvips says."""
    return " ".join((str(error).strip().splitlines() or ["libvips gave no reason"])[-1].split())
