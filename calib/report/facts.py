"""What a bundle knows of its engines in 8 bits: their recipes with the evidence, and how the gate judged them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.calib.judge.gates import CROPS, EIGHT_BITS, REPORT
from tilewright.calib.judge.likeness import likeness
from tilewright.calib.recipe import FORMATS, IN_BUNDLE, Recipe, read_recipe
from tilewright.calib.recipe.evidence import Point
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["crops_of", "figures", "filled", "report"]


def report(root: Path, *, expect: str | None = None) -> dict[str, Any]:
    """The facts of a bundle with engines in 8 bits, as values of JSON."""
    bundle = read_bundle(root, expect=expect)
    files = {p: file for p in EIGHT_BITS if (file := bundle.root / IN_BUNDLE.format(p)).is_file()}
    if not files:
        raise UsageError(f"{root} has no engine in int8 or fp8; add one with 'export compile --recipe'")
    judged = _judged(bundle.root / REPORT)
    return {
        "bundle": bundle.digest,
        "system": bundle.manifest.system,
        "recipes": {precision: _facts(read_recipe(file)) for precision, file in files.items()},
        "engines": {precision: _engines(bundle, precision) for precision in files},
        "gate": judged,
        "stale": judged is not None and judged["bundle"] != bundle.digest,  # judged before the bundle changed
    }


def crops_of(root: Path, gate: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The parts of a picture that the gate kept, those whose files are there."""
    crops = [] if gate is None else gate.get("crops", [])
    return [crop for crop in crops if (root / CROPS / crop["file"]).is_file()]


def _judged(path: Path) -> dict[str, Any] | None:
    """What the gate wrote, if it did."""
    try:
        judged = json.loads(path.read_text())
        return judged if judged["engines"] and judged["bundle"] else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError):
        raise InputError(f"{path} is damaged; judge the engines again with 'calib gate'") from None


def _facts(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that a report shows."""
    chosen = [place for place, point in enumerate(recipe.evidence.frontier) if _is(point, recipe)]
    return {
        "layers": {name: encode(layer) for name, layer in recipe.layers.items()},
        "quantised": len(recipe.quantised),
        "share": recipe.share(),
        "linear_share": recipe.share("linear"),
        "budget_db": recipe.evidence.budget_db,
        "groups": [encode(group) for group in sorted(recipe.evidence.groups, key=lambda group: group.mean_db)],
        "frontier": [encode(point) for point in recipe.evidence.frontier],
        "chosen": chosen[0] if chosen else None,  # the point of the frontier; none: the recipe was edited
        "inputs": {
            name: {
                "scale": float(np.asarray(entering.scaling(FORMATS[recipe.format]).scale)),
                "range": list(entering.range),
                "method": entering.method,
                "smoothed": len(entering.factors),
                "largest": list(recipe.evidence.largest.get(name, ())),
            }
            for name, entering in recipe.inputs.items()
        },
    }


def _is(point: Point, recipe: Recipe) -> bool:
    """Whether a recipe is a point of its frontier."""
    kept = {layer for g in recipe.evidence.groups if g.name in point.kept for layer in g.layers}
    judged = {layer for group in recipe.evidence.groups for layer in group.layers} or recipe.quantised
    return recipe.quantised == judged - kept


def _engines(bundle: Bundle, precision: str) -> list[dict[str, Any]]:
    """The engines of a precision."""
    tables = bundle.weights.tensors
    return [
        {
            "component": name,
            "engine": spec.name,
            "form": spec.form.text if spec.form else "",
            "weight_bytes": sum(r.length for r in tables.get(spec.weights or name, {}).values()),
            "float_bytes": sum(r.length for r in tables.get(name, {}).values()),
        }
        for name, component in sorted(bundle.manifest.components.items())
        for spec in component.engines
        if spec.precision == precision
    ]


def figures(engine: Mapping[str, Any]) -> dict[str, str]:
    """Numbers of an engine as texts; empty: it has no such number."""
    changed, lost = (engine.get(key) for key in ("changed_choices", "lost_db"))
    return {
        "mean": likeness(engine["mean_db"]),
        "worst": likeness(engine["worst_db"]),
        "ssim": f"{engine['ssim']:.4f}",
        "changed": "" if changed is None else f"{changed:.1%}",
        "lost": "" if lost is None else f"{round(lost, 3) + 0.0:.3f}",
        "seconds": f"{engine['seconds']:.3g}",
    }


def filled(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """A table without its empty columns."""
    known = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    return [heads[place] for place in known], [[row[place] for place in known] for row in rows]
