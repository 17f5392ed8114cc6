"""Images in, quantisation scales out, and engines in 8 bits that were judged."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.calib.collector import collect
    from tilewright.calib.engines import add_engines
    from tilewright.calib.frontier import sensitivity
    from tilewright.calib.gates import gate
    from tilewright.calib.insertion import insert, quantised_weights
    from tilewright.calib.observers import read_observations
    from tilewright.calib.one_step import calibrate
    from tilewright.calib.ranges import range_of, scaling_of
    from tilewright.calib.recipe import Recipe, make_recipe, read_recipe

__all__ = [
    "Recipe",
    "add_engines",
    "calibrate",
    "collect",
    "gate",
    "insert",
    "make_recipe",
    "quantised_weights",
    "range_of",
    "read_observations",
    "read_recipe",
    "scaling_of",
    "sensitivity",
]

_HOMES = {
    "add_engines": "engines",
    "calibrate": "one_step",
    "collect": "collector",
    "gate": "gates",
    "read_observations": "observers",
    "sensitivity": "frontier",
    **dict.fromkeys(("insert", "quantised_weights"), "insertion"),
    **dict.fromkeys(("range_of", "scaling_of"), "ranges"),
    **dict.fromkeys(("Recipe", "make_recipe", "read_recipe"), "recipe"),
}


def __getattr__(name: str) -> Any:
    """Import a name on its first use, so that the formats need NumPy alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
