"""Images in, quantisation scales out."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.calib.collector import collect
    from tilewright.calib.observers import read_observations
    from tilewright.calib.ranges import range_of, scaling_of

__all__ = ["collect", "range_of", "read_observations", "scaling_of"]

_HOMES = {
    "collect": "collector",
    "read_observations": "observers",
    **dict.fromkeys(("range_of", "scaling_of"), "ranges"),
}


def __getattr__(name: str) -> Any:
    """Import a name on its first use, so that the formats need NumPy alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
