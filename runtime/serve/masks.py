"""Masks in OpenAI's sense: a restored picture shows where the mask is transparent, the enlarged source elsewhere."""

from typing import BinaryIO

import numpy as np
from PIL import Image

from tilewright.runtime.errors import InputError
from tilewright.runtime.images.read import Picture, Pixels, read_image
from tilewright.runtime.images.write import assemble

__all__ = ["masked"]


def masked(pixels: Pixels, source: Picture, mask: BinaryIO) -> Pixels:
    """The restored pixels where a mask is transparent, and the enlarged source where it is not."""
    mask.seek(0)
    height, width = source.rgb.shape[:2]
    picture = read_image(mask.read(), max_pixels=height * width)
    if picture.alpha is None or picture.alpha.shape != (height, width):
        shape = "no transparency" if picture.alpha is None else "x".join(map(str, picture.rgb.shape[1::-1])) + " px"
        raise InputError(f"the mask has {shape}; send a PNG of {width}x{height} px, transparent where to restore")
    size = (pixels.shape[1], pixels.shape[0])
    enlarged = assemble(np.asarray(Image.fromarray(source.rgb).resize(size, Image.Resampling.BICUBIC)), source)
    kept = np.asarray(Image.fromarray(picture.alpha).resize(size, Image.Resampling.BILINEAR)).astype(np.uint16)
    kept = kept.reshape(*kept.shape, *([1] * (pixels.ndim - 2)))
    mixed: Pixels = ((pixels * (255 - kept) + enlarged * kept + 127) // 255).astype(np.uint8)
    return mixed
