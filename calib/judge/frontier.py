"""How much each group of layers costs the picture in 8 bits, and the frontier: more layers in float, closer pictures.

First one group at a time is in 8 bits, and all else in float. Then all are in 8 bits, and the group that costs most for
its share of the work returns to float, one after the other. Pictures are always computed, never predicted.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.calib.judge.trial import Score, Trial
from tilewright.calib.observe.observers import Observations
from tilewright.calib.recipe import Recipe
from tilewright.calib.recipe.evidence import Evidence, Group, Point
from tilewright.calib.recipe.make import graphs_of, make_recipe
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import from_json, to_json
from tilewright.runtime.errors import AccuracyError, BundleError, InputError, UsageError
from tilewright.runtime.images.read import read_image
from tilewright.runtime.resume.checkpoint import beside

__all__ = [
    "BY",
    "Sensitivity",
    "calibrated_pictures",
    "frontier_rows",
    "read_sensitivity",
    "sensitivity",
    "with_all",
    "within_budget",
]

BY = ("kind", "block", "layer")
IMAGES = 4
ENOUGH_DB = 60.0  # closer than this, no more layers return to float
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Sensitivity:
    """The content of the file."""

    networks: str
    format: str
    method: str | None
    smooth: float | None
    images: tuple[str, ...]
    by: str
    groups: tuple[Group, ...] = field(default=())
    frontier: tuple[Point, ...] = field(default=())


def sensitivity(
    bundle: Bundle,
    observed: Observations,
    facts: Mapping[str, Any],
    pictures: Sequence[Any],
    output: Path,
    format: str,
    *,
    method: str | None = None,
    smooth: float | None = None,
    by: str = "kind",
    threads: int = 0,
    weights_dir: Path | None = None,
    enough_db: float = ENOUGH_DB,
    on_progress: Report = lambda part, done, total: None,
) -> Sensitivity:
    """Judge all groups, then the frontier, and write the file. What was finished before a stop is not judged again."""
    if by not in BY:
        raise UsageError(f"by={by!r} is not one of {', '.join(BY)}")
    graphs = graphs_of(bundle, weights_dir)
    recipe = make_recipe(bundle, observed, facts, format, method=method, smooth=smooth, graphs=graphs)
    groups = _groups(recipe, by)
    names = tuple(picture["name"] for picture in facts.get("images", ()))
    start = Sensitivity(recipe.networks, format, method, smooth, names, by)
    done = _begun(beside(output), start)
    steps = facts.get("options", {}).get("steps")
    judged, points = {g.name: g for g in done.groups}, list(done.frontier)

    def keep() -> None:
        _write(beside(output), _with(start, judged, points))

    with Trial(bundle, pictures, steps=steps, threads=threads, weights_dir=weights_dir) as trial:
        codes = trial.weights(graphs, recipe)
        for place, (name, layers) in enumerate(groups.items()):
            on_progress("groups", place, len(groups))
            if name not in judged:
                score = trial.score_of(graphs, recipe.only(layers), codes)
                share = sum(recipe.layers[layer].share for layer in layers)
                judged[name] = Group(name, tuple(layers), share, score.mean, score.worst)
                keep()
        order = sorted(judged.values(), key=lambda g: -_cost(g))
        for kept in range(len(points), len(order)):
            if points and points[-1].mean_db >= enough_db:
                break
            on_progress("frontier", kept, len(order))
            back = order[:kept]
            left = recipe.keeping((layer for group in back for layer in group.layers), "")
            points.append(_point(back, left, trial.score_of(graphs, left, codes)))
            keep()
    result = _with(start, judged, points)
    _write(output, result)
    beside(output).unlink(missing_ok=True)
    return result


def _groups(recipe: Recipe, by: str) -> dict[str, list[str]]:
    """Group -> its layers, of those in 8 bits."""
    groups: dict[str, list[str]] = {}
    for name in recipe.layers:
        if name in recipe.quantised:
            groups.setdefault(_group(name, by), []).append(name)
    return groups


def _group(layer: str, by: str) -> str:
    if by == "kind":
        return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", layer)
    found = re.match(r"(.*?\.\d+)\.", layer) if by == "block" else None
    return found[1] if found else layer


def _cost(group: Group) -> float:
    """The error of a group for its share of the work."""
    return float(10 ** (-group.mean_db / 10)) / max(group.share, 1e-9)


def _point(back: Sequence[Group], recipe: Recipe, score: Score) -> Point:
    names = tuple(group.name for group in back)
    return Point(names, recipe.share(), recipe.share("linear"), score.mean, score.worst, score.changed)


def _with(start: Sensitivity, judged: Mapping[str, Group], points: Sequence[Point]) -> Sensitivity:
    return Sensitivity(**{**_fields(start), "groups": tuple(judged.values()), "frontier": tuple(points)})


def _fields(value: Sensitivity) -> dict[str, Any]:
    return {name: getattr(value, name) for name in asdict(value)}


def _write(path: Path, value: Sensitivity) -> None:
    with writing(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def _begun(path: Path, start: Sensitivity) -> Sensitivity:
    if not path.exists():
        return start
    before = read_sensitivity(path)
    if any(getattr(before, name) != value for name, value in _fields(start).items() if name not in PROGRESS):
        raise UsageError(f"{path} is of other options; ask for the same as before, or remove it to begin anew")
    return before


PROGRESS = ("groups", "frontier")


def read_sensitivity(path: str | os.PathLike[str]) -> Sensitivity:
    """The sensitivity in a file."""
    try:
        return from_json(Sensitivity, Path(path).read_bytes(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); check the path") from error
    except BundleError as error:
        said = str(error).removesuffix("; rebuild the bundle")
        raise InputError(f"{said}; make it anew with 'calib sensitivity'") from None


def within_budget(recipe: Recipe, found: Sensitivity, budget_db: float) -> Recipe:
    """The recipe with the most layers in 8 bits whose pictures were close enough."""
    if (recipe.networks, recipe.format) != (found.networks, found.format):
        raise InputError(
            f"the sensitivity is of another bundle, or of {found.format}; judge this bundle in {recipe.format}"
        )
    best = max(found.frontier, key=lambda point: point.mean_db, default=None)
    within = [point for point in found.frontier if point.mean_db >= budget_db]
    if not within:
        reached = f"the best is {best.mean_db:.1f} dB with {best.share:.0%} of the work in 8 bits" if best else ""
        raise AccuracyError(f"no recipe reaches {budget_db:g} dB; {reached}; lower the budget, or smooth")
    point = max(within, key=lambda point: (point.share, point.mean_db))
    groups = {group.name: group for group in found.groups}
    for name in point.kept:
        why = f"alone in 8 bits it costs most for its work: {groups[name].mean_db:.1f} dB"
        recipe = recipe.keeping(groups[name].layers, why)
    evidence = Evidence(recipe.evidence.largest, found.groups, found.frontier, budget_db)
    return replace(recipe, evidence=evidence)


def with_all(recipe: Recipe, score: Score, budget_db: float) -> Recipe:
    """The recipe with the evidence that all its layers in 8 bits are within the budget."""
    return replace(
        recipe, evidence=replace(recipe.evidence, frontier=(_point((), recipe, score),), budget_db=budget_db)
    )


def frontier_rows(frontier: Sequence[Point]) -> list[list[str]]:
    """The rows of the frontier as text: shares in 8 bits, dB, what returned to float."""
    return [
        [
            f"{p.share:.1%}",
            f"{p.linear:.1%}",
            f"{p.mean_db:.1f}",
            f"{p.worst_db:.1f}",
            p.kept[-1] if p.kept else "all in 8 bits",
        ]
        for p in frontier
    ]


def calibrated_pictures(
    bundle: Bundle, facts: Mapping[str, Any], folder: Path | None = None, most: int = IMAGES
) -> list[npt.NDArray[np.uint8]]:
    """A tile from the middle of some of the pictures that were observed."""
    folder = Path(facts.get("folder", ".")) if folder is None else folder
    program = bundle.program
    side = max((p.tiles.px for p in program.passes if p.tiles), default=program.multiple_px) // program.scale
    names = [image["name"] for image in facts["images"]]
    chosen = [names[place * len(names) // min(most, len(names))] for place in range(min(most, len(names)))]
    pictures = []
    for name in chosen:
        if not (folder / name).is_file():
            raise InputError(f"{folder} does not hold {name}, which was observed; give its folder with --images-dir")
        rgb = read_image(folder / name).rgb
        top, left = (max(0, (size - side) // 2) for size in rgb.shape[:2])
        pictures.append(np.ascontiguousarray(rgb[top : top + side, left : left + side]))
    return pictures
