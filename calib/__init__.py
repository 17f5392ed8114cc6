"""Images in, quantisation scales out, and engines in 8 bits that were judged."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.calib.engines import add_engines
    from tilewright.calib.insertion import insert, quantised_weights
    from tilewright.calib.judge.frontier import sensitivity
    from tilewright.calib.judge.gates import gate
    from tilewright.calib.observe.collector import collect
    from tilewright.calib.observe.observers import read_observations
    from tilewright.calib.one_step import calibrate
    from tilewright.calib.recipe import Recipe, read_recipe
    from tilewright.calib.recipe.make import make_recipe
    from tilewright.calib.scales.ranges import range_of, scaling_of

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
    "collect": "observe.collector",
    "gate": "judge.gates",
    "make_recipe": "recipe.make",
    "read_observations": "observe.observers",
    "sensitivity": "judge.frontier",
    **dict.fromkeys(("insert", "quantised_weights"), "insertion"),
    **dict.fromkeys(("range_of", "scaling_of"), "scales.ranges"),
    **dict.fromkeys(("Recipe", "read_recipe"), "recipe"),
}


def __getattr__(name: str) -> Any:
    """Import a name on its first use, so that the formats need NumPy alone."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
