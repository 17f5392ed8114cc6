"""What a bundle is judged on: a picture, a value for each of its inputs, and jobs that are small enough."""

import contextlib
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.errors import UsageError
from tilewright.runtime.execute.walk import Job
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.restore import Restorer
from tilewright.runtime.text import token_ids

__all__ = ["SMALL_SEAM_STEPS", "example_inputs", "few_steps", "one_tile", "sample_photo", "small_job"]

WORDS = "a stone bridge over a river"
FEW_STEPS = 8  # sampling steps when engines are compared
LONGEST_TIMED_PX = 256  # side of the tile that engines are timed on: twice the side is 16 times the attention
SMALL_SEAM_STEPS = 2  # for small networks: the second step reads joined tiles, and seams show as much as after 4


def sample_photo(width: int, height: int, scale: int) -> npt.NDArray[np.uint8]:
    """A picture with edges, gradients and texture, whose enlargement by `scale` has this size."""
    columns, rows = -(-width // scale), -(-height // scale)
    y, x = np.mgrid[0:rows, 0:columns] / max(rows, columns)
    channels = [np.sin(9 * x + 4 * y) * 0.4 + 0.5, (np.hypot(x - 0.5, y - 0.4) < 0.3) * 0.7 + 0.2 * x, (x * 23 % 1) * y]
    texture = np.random.Generator(np.random.Philox(key=1)).normal(0, 0.04, (rows, columns, 3))
    rgb = np.clip(np.stack(channels, -1) + texture, 0, 1)
    return np.asarray(rgb * 255 + 0.5, np.uint8)


def example_inputs(bundle: Bundle) -> dict[str, Any]:
    """A value for every input without a default: words, or seeded numbers."""
    program = bundle.program
    of_words = {name for text in program.texts.values() for name in text.ids}
    generator = np.random.Generator(np.random.Philox(key=2))
    inputs: dict[str, Any] = {name: _fitting_words(bundle, name) for name in program.texts}
    for name, spec in program.inputs.items():
        if spec.default is None and name not in of_words:
            inputs[name] = generator.standard_normal(spec.shape).astype(spec.dtype)
    return inputs


def _fitting_words(bundle: Bundle, name: str) -> str:
    """As many words as fit into the encoders of a text; small encoders take few."""
    words, lengths = WORDS.split(), {i: bundle.program.inputs[i].shape[1] for i in bundle.program.texts[name].ids}
    for count in range(len(words), 0, -1):
        with contextlib.suppress(UsageError):
            for i, tokenizer in bundle.program.texts[name].ids.items():
                token_ids(bundle.path(tokenizer), " ".join(words[:count]), lengths[i])
            return " ".join(words[:count])
    return ""


def small_job(restorer: Restorer, size_px: int | None) -> Job:
    """A job of a square of this size in the program's tiles, or of a small picture in smaller tiles."""
    program = restorer.bundle.program
    multiple = program.multiple_px
    fixed = min((px for p in program.passes if p.tiles for px in p.tiles.fixed_px), default=None)
    tile, overlap = (fixed, None) if fixed else (6 * multiple, 2 * multiple)
    width, height = (size_px, size_px) if size_px else (tile + 4 * multiple, tile + multiple)
    image = Enlarged(sample_photo(width, height, program.scale), program.scale, multiple, fixed or 1)
    return Job(image) if size_px else Job(image, tile_px=tile, overlap_px=overlap, steps=few_steps(restorer, FEW_STEPS))


def one_tile(restorer: Restorer, inputs: dict[str, Any]) -> Job:
    """A job of one tile of the usual size, or of a smaller one: it is only timed, and times are per pixel."""
    program = restorer.bundle.program
    usual, multiple = min((p.tiles for p in program.passes if p.tiles), key=lambda tiles: tiles.px), program.multiple_px
    side = usual.px if usual.fixed_px else min(usual.px, LONGEST_TIMED_PX // multiple * multiple)
    image = Enlarged(sample_photo(side, side, program.scale), program.scale, multiple, 1)
    return Job(image, steps=few_steps(restorer, SMALL_SEAM_STEPS), inputs=inputs)


def few_steps(restorer: Restorer, few: int) -> int | None:
    """This many steps, or none if tables in the bundle fix the program's number of steps."""
    calls = [c for p in restorer.bundle.program.passes for *_, c in p.calls()]
    tables = {source[1:] for c in calls for source in c.inputs.values() if source[0] == "@"}
    return None if any(name.partition(".")[0] in tables for name in restorer.constants) else few
