"""A recipe: for every layer, whether it computes in 8 bits and why, and the range of the numbers that enter it.

It is a YAML file, which may be edited. Its schema is docs/recipe.schema.json.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.calib.recipe.evidence import Evidence
from tilewright.calib.scales.formats import E4M3FN, INT8, UINT8, Format, Scaling
from tilewright.calib.scales.ranges import spread
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.safetensors import safetensors_start
from tilewright.runtime.bundle.strict import check_limits, encode, from_json, schema
from tilewright.runtime.errors import BundleError, InputError
from tilewright.runtime.inputs import read_tensors

__all__ = [
    "FORMATS",
    "IN_BUNDLE",
    "KEPT",
    "Entering",
    "LayerRecipe",
    "Recipe",
    "json_schema",
    "read_recipe",
]

FORMATS: dict[str, Format] = {"int8": INT8, "fp8": E4M3FN}  # precision of a recipe -> format of its numbers
KEPT = "kept"
FACTORS = ".safetensors"  # instead of .yaml
IN_BUNDLE = "reports/recipe.{}.yaml"  # for each precision


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
            with writing(beside) as temporary, temporary.open("wb") as file:
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
