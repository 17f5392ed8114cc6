"""Values that are made when a test first asks for them, so that a test pays for its own alone."""

from collections.abc import Callable
from typing import Any

__all__ = ["Lazily"]


class Lazily(dict[Any, Any]):
    """Key -> value, made from the key at its first use."""

    def __init__(self, make: Callable[[Any], Any]) -> None:
        self.make = make

    def __missing__(self, key: Any) -> Any:
        self[key] = self.make(key)
        return self[key]
