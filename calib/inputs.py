"""All that engines in 8 bits depend on, so that a repeated build can tell that nothing changed. It imports little."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewright.calib.pictures import IMAGES, split
from tilewright.calib.recipe import Recipe
from tilewright.export.build.code import code
from tilewright.runtime.bundle.digests import sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.strict import encode

__all__ = ["inputs_of"]


def inputs_of(
    format: str, targets: Sequence[str], *, recipe: Recipe | None = None, folder: Path | None = None, **options: Any
) -> str:
    """The digest of all that engines in 8 bits depend on besides the bundle: a recipe or pictures, and our code."""
    asked = {"format": format, "targets": list(targets), **options, **code("tilewright.calib.one_step")}
    asked |= {} if recipe is None else {"recipe": encode(recipe)}
    asked |= {} if folder is None else {"images": [sha256_of_file(p) for part in split(folder, IMAGES) for p in part]}
    return sha256_of_bytes(json.dumps(asked, sort_keys=True).encode())
