"""From a bundle and a folder of pictures to judged engines in 8 bits, in one step.

A quarter of the pictures is held out: the engines are judged on those, and everything else sees only the others.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.calib.engines import Added, add_engines
from tilewright.calib.judge.frontier import calibrated_pictures, sensitivity, with_all, within_budget
from tilewright.calib.judge.gates import BUDGET_DB, CROPS, gate
from tilewright.calib.judge.trial import Trial
from tilewright.calib.observe.collector import collect
from tilewright.calib.pictures import IMAGES, split
from tilewright.calib.recipe import Recipe
from tilewright.calib.recipe.make import graphs_of, make_recipe
from tilewright.runtime.bundle.read import read_bundle

__all__ = ["Calibrated", "calibrate"]

SMOOTH = {"int8": 0.5, "fp8": None}
MARGIN_DB = 2.0  # other pictures may be a little less close than those that the recipe was chosen by
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Calibrated:
    """The result of the one step."""

    recipe: Recipe
    added: Added
    report: dict[str, Any]  # of the gate


def calibrate(
    root: Path,
    folder: Path,
    format: str,
    *,
    budget_db: float = BUDGET_DB,
    images: int = IMAGES,
    targets: tuple[str, ...] = ("ort", "openvino"),
    steps: int | None = None,
    threads: int = 0,
    weights_dir: Path | None = None,
    on_progress: Report = lambda part, done, total: None,
) -> Calibrated:
    """Observe, choose a recipe within the budget, add the engines to the bundle, and judge them."""
    seen, judged = split(folder, images)
    bundle = read_bundle(root)
    options: dict[str, Any] = {"threads": threads, "weights_dir": weights_dir}
    with tempfile.TemporaryDirectory(prefix="tilewright-") as temporary:
        observing, judging = (_links(Path(temporary) / name, paths) for name, paths in (("s", seen), ("j", judged)))
        collected = collect(
            bundle,
            observing,
            Path(temporary) / "stats.safetensors",
            images=len(seen),
            steps=steps,
            **options,
            on_progress=lambda done, count, share: on_progress("observing", int(1000 * share), 1000),
        )
        observed, facts = collected.observations, collected.facts
        graphs = graphs_of(bundle, weights_dir)
        recipe = make_recipe(bundle, observed, facts, format, smooth=SMOOTH[format], graphs=graphs)
        pictures = calibrated_pictures(bundle, facts)
        with Trial(bundle, pictures, steps=steps, **options) as trial:
            score = trial.score_of(graphs, recipe, trial.weights(graphs, recipe))
        if score.mean >= budget_db + MARGIN_DB:
            recipe = with_all(recipe, score, budget_db)
        else:
            found = sensitivity(
                bundle,
                observed,
                facts,
                pictures,
                Path(temporary) / "sens.json",
                format,
                smooth=SMOOTH[format],
                enough_db=budget_db + MARGIN_DB,
                on_progress=on_progress,
                **options,
            )
            recipe = within_budget(recipe, found, min(budget_db + MARGIN_DB, _best(found)))
        added = add_engines(root, recipe, targets, **options, on_progress=on_progress)
        report = gate(
            root,
            judging,
            budget_db=budget_db,
            precision=format,
            steps=steps,
            crops=root / CROPS,
            **options,
            on_progress=on_progress,
        )
    return Calibrated(recipe, added, report)


def _best(found: Any) -> float:
    return max((point.mean_db for point in found.frontier), default=0.0)


def _links(folder: Path, paths: list[Path]) -> Path:
    """A folder with these pictures alone."""
    folder.mkdir()
    for path in paths:
        (folder / path.name).symlink_to(path.absolute())
    return folder
