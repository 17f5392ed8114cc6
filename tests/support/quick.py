"""Parameters of which `make check` tries a few only."""

from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["few_quick"]


def few_quick(names: Iterable[str], *quick: str) -> list[Any]:
    """The names as parameters of a test; those that are not named as quick are slow."""
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in names]
