"""What an error of a backend means for the caller, and what to do about it. Each backend lists the words it uses."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import BundleError, ResourceError, TilewrightError

__all__ = ["DAMAGED", "MEMORY", "OTHER_GRAPH", "OTHER_SIZE", "Reason", "explained"]

Reason = tuple[str, type[TilewrightError], str]  # words of a message, the error that they mean, and what to do

MEMORY = "use a smaller --tile or --memory low"
OTHER_SIZE = "the graph does not take this size: use the bundle's own --tile, or rebuild the bundle for this one"
OTHER_GRAPH = "the graph is not the one that bundle.json describes: rebuild the bundle"
DAMAGED = "the graph is damaged: copy the bundle again, or rebuild the bundle"


def explained(
    version: Callable[[], str],
    reasons: Sequence[Reason],
    noise: re.Pattern[str],
    graph: Path,
    what: str,
    error: Exception,
) -> TilewrightError:
    """The error for the caller: the first reason that fits counts. `noise`: parts of messages that help nobody.

    Each backend gives the first three arguments once.
    """
    text, name = " ".join(str(error).split()), version()
    told = f"{graph}: {name} {what} ({one_line(noise.sub('', text).strip())})"
    if isinstance(error, MemoryError):
        return ResourceError(f"{told}; {MEMORY}")
    for words, kind, advice in reasons:
        if re.search(words, text, re.IGNORECASE):
            return kind(f"{told}; {advice}")
    return BundleError(
        f"{told}; verify the bundle with 'tilewright export verify';"
        f" if it finds no fault, rebuild the bundle or install another version of {name.partition(' ')[0]}"
    )
