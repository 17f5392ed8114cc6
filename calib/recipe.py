"""A recipe: for every layer, whether it computes in 8 bits and why, and the range of the numbers that enter it.

It is a YAML file, which may be edited. Its schema is docs/recipe.schema.json.
"""

import fnmatch
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.calib.evidence import Evidence
from tilewright.calib.formats import E4M3FN, INT8, UINT8, Format, Scaling
from tilewright.calib.layers import Layer, Part, StandardGraph, standard_graph
from tilewright.calib.networks import check_networks, networks_digest
from tilewright.calib.observers import Observations
from tilewright.calib.ranges import range_of, spread
from tilewright.export.systems import names, system
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.safetensors import safetensors_start
from tilewright.runtime.bundle.strict import check_limits, encode, from_json, schema
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.inputs import read_tensors

__all__ = [
    "FORMATS",
    "KEPT",
    "Entering",
    "LayerRecipe",
    "Recipe",
    "graphs_of",
    "json_schema",
    "make_recipe",
    "read_recipe",
]

FORMATS: dict[str, Format] = {"int8": INT8, "fp8": E4M3FN}  # precision of a recipe -> format of its numbers
KEPT = "kept"
FACTORS = ".safetensors"  # instead of .yaml
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Entering:
    """The numbers that enter a layer: the range that the codes are spread over."""

    range: tuple[float, float]
    method: str  # that chose the range
    # smoothing divides each channel by its factor, and multiplies the weight by it; in a file: where the factors are
    factors: tuple[float, ...] | str = ()

    def __post_init__(self) -> None:
        check_limits(self)
        if not self.range[0] <= self.range[1]:
            raise ValueError(f"range {list(self.range)} must go from the lowest to the highest number")
        if not isinstance(self.factors, str) and not all(0 < factor < float("inf") for factor in self.factors):
            raise ValueError("factors must be above 0")

    def scaling(self, format: Format, *, unsigned: bool = False) -> Scaling:
        """The scaling of the numbers. `unsigned`: uint8 with a zero point instead of int8."""
        return spread(UINT8 if unsigned and format is INT8 else format, *self.range)


@dataclass(frozen=True)
class LayerRecipe:
    """One layer."""

    weight: str = field(metadata={"enum": (INT8.name, E4M3FN.name, KEPT)})  # the format of its weight, or kept in float
    kind: str = field(metadata={"enum": ("linear", "convolution")})
    inputs: tuple[str, ...] = field(metadata={"minItems": 1})  # tensors that enter it
    share: float = field(metadata={"minimum": 0, "maximum": 1})  # of the multiplications of all layers
    why: str = ""

    def __post_init__(self) -> None:
        check_limits(self)


@dataclass(frozen=True)
class Recipe:
    """How the layers of a bundle compute in 8 bits."""

    recipe: int = field(metadata={"enum": (1,)})  # the version of this document
    system: str
    networks: str  # SHA-256 of the bundle's graphs, weights and program
    format: str = field(metadata={"enum": tuple(FORMATS)})
    layers: dict[str, LayerRecipe]
    inputs: dict[str, Entering]
    images: tuple[str, ...] = ()  # SHA-256 of the pictures that were observed, on which the result must not be judged
    evidence: Evidence = field(default_factory=Evidence)

    def __post_init__(self) -> None:
        check_limits(self)
        lacking = {
            i for layer in self.layers.values() if layer.weight != KEPT for i in layer.inputs
        } - self.inputs.keys()
        if lacking:
            raise ValueError(f"inputs lacks {min(lacking)!r}, which a layer in 8 bits reads")
        other = {layer.weight for layer in self.layers.values()} - {KEPT, FORMATS[self.format].name}
        if other:
            raise ValueError(f"weight {min(other)!r} does not fit format {self.format!r}; GPUs take one 8-bit type")

    @property
    def quantised(self) -> set[str]:
        """The layers in 8 bits."""
        return {name for name, layer in self.layers.items() if layer.weight != KEPT}

    def share(self, kind: str | None = None) -> float:
        """The share of the multiplications in 8 bits, of all layers or of those of one kind."""
        layers = [layer for layer in self.layers.values() if kind in (None, layer.kind)]
        every = sum(layer.share for layer in layers)
        return sum(layer.share for layer in layers if layer.weight != KEPT) / every if every else 0.0

    def keeping(self, names: Iterable[str], why: str) -> "Recipe":
        """The recipe with these layers kept in float."""
        kept = {name: replace(self.layers[name], weight=KEPT, why=why) for name in names}
        return replace(self, layers=self.layers | kept)

    def only(self, names: Iterable[str]) -> "Recipe":
        """The recipe with no other layer in 8 bits."""
        return self.keeping(self.quantised - set(names), "left out")

    def write(self, path: Path) -> None:
        """Write the file, completely or not at all, and before it the file of factors beside it."""
        import yaml

        beside, inputs = path.with_suffix(FACTORS), dict(self.inputs)
        factors = {name: np.asarray(e.factors, np.float32) for name, e in inputs.items() if e.factors}
        inputs |= {name: replace(inputs[name], factors=beside.name) for name in factors}
        if factors:
            specs = {name: ("float32", array.shape) for name, array in factors.items()}
            with writing(beside) as temporary, temporary.open("xb") as file:
                file.write(safetensors_start(specs, {}))
                file.writelines(array.tobytes() for array in factors.values())
        document = encode(replace(self, inputs=inputs))
        dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
        text = yaml.dump(document, Dumper=dumper, sort_keys=False, width=120, default_flow_style=None)
        with writing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe."""
    return schema(Recipe, "Tilewright recipe, version 1")


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a file."""
    import yaml

    path = Path(path)
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        return _with_factors(from_json(Recipe, json.dumps(document), str(path)), path)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
        raise InputError(f"{path} is no YAML ({' '.join(str(error).split())}); make it with 'calib recipe'") from None
    except BundleError as error:
        said = str(error).removesuffix("; rebuild the bundle")
        raise InputError(f"{said}; see docs/recipe.schema.json, or make the recipe with 'calib recipe'") from None


def _with_factors(recipe: Recipe, path: Path) -> Recipe:
    """The recipe with the factors that are in files beside it."""
    inputs = dict(recipe.inputs)
    for name, entering in inputs.items():
        if isinstance(entering.factors, str):
            beside = path.parent / Path(entering.factors).name
            tensors = read_tensors(beside) if beside.is_file() else {}
            if name not in tensors:
                raise InputError(f"{beside} does not hold the factors of {name!r}; keep it beside {path.name}")
            inputs[name] = replace(entering, factors=tuple(tensors[name].tolist()))
    return replace(recipe, inputs=inputs)


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
    from tilewright.calib.smoothing import smoothing_factors

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
