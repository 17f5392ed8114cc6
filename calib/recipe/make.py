"""Making a recipe from statistics: every layer in 8 bits, except those that the system keeps in float."""

import fnmatch
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.calib.networks import check_networks, networks_digest
from tilewright.calib.observe.observers import Observations
from tilewright.calib.recipe import FORMATS, KEPT, Entering, LayerRecipe, Recipe
from tilewright.calib.recipe.evidence import Evidence
from tilewright.calib.recipe.layers import Layer, Part, StandardGraph, standard_graph
from tilewright.calib.scales.formats import INT8, Format
from tilewright.calib.scales.ranges import range_of
from tilewright.export.systems import names, system
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.errors import UsageError

__all__ = ["graphs_of", "make_recipe"]

Floats = npt.NDArray[np.float32]


def graphs_of(bundle: Bundle, weights_dir: Path | None = None) -> dict[str, StandardGraph]:
    """The graph of every component that has weights."""
    names = sorted(name for name in bundle.program.components() if bundle.weights.tensors.get(name))
    return {name: standard_graph(bundle, name, weights_dir) for name in names}


def make_recipe(
    bundle: Bundle,
    observed: Observations,
    facts: Mapping[str, Any],
    format: str,
    *,
    method: str | None = None,
    smooth: float | None = None,
    graphs: Mapping[str, StandardGraph] | None = None,
    weights_dir: Path | None = None,
) -> Recipe:
    """A recipe with every layer in 8 bits but those that the system keeps.

    `method` chooses ranges, see `calib.ranges`. `smooth`: how much of the difference in size between the channels of
    an input moves into the weights, from 0 to 1; it is done where a normalisation or a modulation can take it.
    """
    from tilewright.calib.recipe.smoothing import smoothing_factors

    if format not in FORMATS:
        raise UsageError(f"format={format!r} is not one of {', '.join(FORMATS)}")
    if smooth is not None and not 0 <= smooth <= 1:
        raise UsageError(f"smooth={smooth} is not a number from 0 to 1")
    check_networks(bundle, facts.get("networks", ""), "the file of statistics")
    graphs = graphs_of(bundle, weights_dir) if graphs is None else graphs
    keep = system(bundle.manifest.system).keep if bundle.manifest.system in names() else {}
    layers = {n: layer for g in graphs.values() for n, layer in g.layers(observed.tensors).items()}
    work = {name: layer.work(_elements(observed, layer)) for name, layer in layers.items()}
    whole = max(1.0, sum(work.values()))
    rows: dict[str, LayerRecipe] = {}
    for name, layer in layers.items():
        pattern = next((pattern for pattern in keep if fnmatch.fnmatchcase(name, pattern)), None)
        weight, why = (FORMATS[format].name, "") if pattern is None else (KEPT, f"{keep[pattern]} ({pattern})")
        inputs = tuple(part.name for part in layer.parts)
        rows[name] = LayerRecipe(weight, layer.kind, inputs, round(work[name] / whole, 6), why)
    quantised = {name: layer for name, layer in layers.items() if rows[name].weight != KEPT}
    factors = {} if smooth is None else smoothing_factors(graphs, quantised, observed, smooth)
    entering = {}
    for layer in quantised.values():
        for part in layer.parts:
            entering[part.name] = _entering(observed, part, FORMATS[format], method, factors.get(part.name))
    images = tuple(image["sha256"] for image in facts.get("images", ()))
    networks, entering = networks_digest(bundle), dict(sorted(entering.items()))
    parts = {part.name: part for layer in quantised.values() for part in layer.parts}
    evidence = Evidence({name: _largest(observed, parts[name]) for name in entering})
    return Recipe(1, bundle.manifest.system, networks, format, rows, entering, images, evidence)


def _largest(observed: Observations, part: Part) -> tuple[float, ...]:
    """The largest magnitude of an input at each step."""
    seen = [observed.over(part.tensor, [step]) for step in observed.steps(part.tensor)]
    largest = [o.histogram.amax if o.channels is None else o.channels[part.rows].max() for o in seen]
    return tuple(float(f"{number:.4g}") for number in largest)


def _elements(observed: Observations, layer: Layer) -> int:
    """How many numbers entered a layer."""
    return int(observed.over(layer.parts[0].tensor).histogram.magnitudes.sum())


def _entering(
    observed: Observations, part: Part, format: Format, method: str | None, factors: Floats | None
) -> Entering:
    seen = observed.over(part.tensor)
    whole = part.stop is None and factors is None
    usual = "mse" if format is INT8 else "absmax"  # fp8 is as exact for small numbers as for large ones
    if whole or seen.channels is None:
        chosen = method or usual
        return Entering(_rounded(*range_of(seen.histogram, format, chosen)), chosen)
    channels = seen.channels[part.rows]
    divisors = np.ones_like(channels) if factors is None else factors
    amax = float((channels / divisors).max())
    lowest = max(-amax, min(0.0, seen.histogram.lowest) / float(divisors.min()))
    kept = () if factors is None else tuple(map(float, factors))
    return Entering(_rounded(lowest, amax), "absmax", kept)


def _rounded(lowest: float, highest: float) -> tuple[float, float]:
    return float(f"{lowest:.7g}"), float(f"{highest:.7g}")
