"""Writing image files, completely or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tilewright.runtime.errors import ResourceError, UsageError
from tilewright.runtime.images.read import Picture, Pixels, fitting_profile, reason

__all__ = ["FORMATS", "assemble", "check_overwrite", "check_writable", "encode_image", "write_image"]


@dataclass(frozen=True)
class _Writer:
    """A Pillow encoder, its options and its limits."""

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


FORMATS = tuple(suffix[1:] for suffix in _WRITERS)


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
    if suffix.lower() not in _WRITERS:
        raise UsageError(f"{path} has the suffix {suffix!r}, which no writer knows: use one of {', '.join(_WRITERS)}")
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


def write_image(path: str | os.PathLike[str], pixels: Pixels, *, icc: bytes | None = None) -> None:
    """Write [H, W], [H, W, 2], [H, W, 3] or [H, W, 4], completely or not at all. JPEG and BMP drop alpha."""
    check_writable(path)
    image, writer, profile = _prepared(str(path), Path(path).suffix.lower(), pixels, icc)
    try:
        _replace(Path(path).resolve(), image, writer, profile)
    except OSError as error:
        advice = "free space there or choose another path"
        raise ResourceError(f"{path} cannot be written ({reason(error)}): {advice}") from error


def encode_image(pixels: Pixels, suffix: str = ".png", *, icc: bytes | None = None) -> bytes:
    """The bytes that `write_image` would write to a file with this suffix: .png, .jpg, .webp, .tif, .bmp."""
    suffix = f".{suffix.lower().removeprefix('.')}"
    if suffix not in _WRITERS:
        raise UsageError(f"no writer knows the suffix {suffix!r}: use one of {', '.join(_WRITERS)}")
    image, writer, profile = _prepared("the image", suffix, pixels, icc)
    file = BytesIO()
    image.save(file, writer.format, icc_profile=profile, **writer.options)
    return file.getvalue()


def _prepared(name: str, suffix: str, pixels: Pixels, icc: bytes | None) -> tuple[Image.Image, _Writer, bytes | None]:
    """The encoder for a suffix, and the parts of an image that its format can hold."""
    writer = _WRITERS[suffix]
    pixels = pixels if writer.alpha else _without_alpha(pixels)
    _check_fits(name, pixels, writer)
    grey = writer.grey and (pixels.ndim == 2 or pixels.shape[2] == 2)
    return Image.fromarray(pixels), writer, fitting_profile(icc, grey)


def _without_alpha(pixels: Pixels) -> Pixels:
    if pixels.ndim == 2 or pixels.shape[2] == 3:
        return pixels
    return pixels[:, :, 0] if pixels.shape[2] == 2 else pixels[:, :, :3]


def _check_fits(name: str, pixels: Pixels, writer: _Writer) -> None:
    height, width = pixels.shape[:2]
    if max(height, width) > writer.max_side:
        limit = f"{writer.max_side} pixels a side"
    elif pixels.nbytes > writer.max_bytes:
        limit = f"{writer.max_bytes} bytes"
    else:
        return
    raise UsageError(f"{name} would be {width}x{height}, over {writer.format}'s limit of {limit}: use .png")


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
