"""What a round of a job has finished, so that the round can go on later, in another process too."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Finished", "Key"]

Key = tuple[str | int, ...]  # ("part", grid, block, tile), ("tile", pass, tile, name) or ("job", name)


@dataclass(frozen=True)
class Finished:
    """The nodes that are done, and the values that the others need. Some values may lie on devices."""

    passes: frozenset[str]  # that the round runs
    ended: frozenset[str]  # passes whose values a further round may read
    keep: bool  # whether there may be a further round
    done: Sequence[bytes]  # block -> 1 for each tile whose node is done, else 0
    regions: Sequence[int]  # of the result, those that have not been handed on
    values: Mapping[Key, Any]
