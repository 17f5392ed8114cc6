"""Converting a prompt into token ids for a text encoder.

Padding and truncation are settings in the tokenizer's JSON file, so this code is the same for all tokenizers.
"""

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.digests import identity_of
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, UsageError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["token_ids"]

SHOWN = 40  # most characters of a text in a message


def token_ids(path: Path, text: str, length: int) -> npt.NDArray[np.int64]:
    """The ids of a text, [1, length], by the tokenizer in a JSON file."""
    shown = repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes of a command line that are not UTF-8 arrive as lone surrogates
        raise UsageError(one_line(f"the text {shown} is not valid Unicode; write it in UTF-8")) from None
    try:
        tokenizer = _read(path, identity_of(path))
    except OSError as error:
        raise BundleError(_unusable(path, error)) from error
    try:
        ids = tokenizer.encode(text).ids
    except Exception as error:  # the package raises nothing more special
        raise BundleError(_unusable(path, error)) from error
    if len(ids) != length:
        advice = "use a shorter one" if len(ids) > length else "rebuild the bundle"
        raise UsageError(one_line(f"the text {shown} has {len(ids)} tokens, the network takes {length}; {advice}"))
    return np.array([ids], np.int64)


@lru_cache(maxsize=8)
def _read(path: Path, identity: tuple[str | int, ...]) -> "Tokenizer":
    """The tokenizer in a file. It is read again only if the file changes."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise EnvironmentMismatch("a text input needs tokenizers: pip install 'tilewright[text]'") from None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise BundleError(_unusable(path, error)) from error


def _unusable(path: Path, error: Exception) -> str:
    return one_line(f"{path} is no tokenizer that can be used ({error}); rebuild the bundle")
