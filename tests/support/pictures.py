"""Pictures, colour profiles and damaged files."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from tilewright.runtime.images.canvas import Enlarged, fill
from tilewright.runtime.images.read import Picture

__all__ = [
    "CMYK_PROFILE",
    "GREY_PROFILE",
    "SRGB",
    "chunk",
    "filled",
    "message",
    "noise",
    "png",
    "same_rgb",
    "saved",
    "whole",
]

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


# Upsampling


def filled(canvas: np.ndarray, height: int, width: int) -> np.ndarray:
    rgb = np.full((height, width, 3), 77, np.uint8)
    fill(rgb, 0, 0, canvas)
    return rgb


def whole(rgb: np.ndarray, scale: int, multiple: int, least: int = 1) -> np.ndarray:
    enlarged = Enlarged(rgb, scale, multiple, least)
    return enlarged.crop(0, 0, *enlarged.shape[1:])
