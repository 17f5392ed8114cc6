"""From a bundle and a folder of pictures to judged engines in 8 bits, in one step.

A quarter of the pictures is held out: the engines are judged on those, and everything else sees only the others.
"""

import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.calib.collector import IMAGES, collect, evenly, images_in
from tilewright.calib.engines import Added, add_engines
from tilewright.calib.frontier import calibrated_pictures, sensitivity, with_all, within_budget
from tilewright.calib.gates import BUDGET_DB, CROPS, gate
from tilewright.calib.recipe import Recipe, graphs_of, make_recipe
from tilewright.calib.trial import Trial
from tilewright.export.build.code import code
from tilewright.runtime.bundle.digests import sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.errors import InputError

__all__ = ["Calibrated", "calibrate", "inputs_of"]

LEAST = 4  # pictures: three to observe, and one to judge
EACH = 4  # of so many pictures, the last one is held out
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
    seen, judged = _split(folder, images)
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


def inputs_of(
    format: str, targets: Sequence[str], *, recipe: Recipe | None = None, folder: Path | None = None, **options: Any
) -> str:
    """The digest of all that engines in 8 bits depend on besides the bundle: a recipe or pictures, and our code."""
    asked = {"format": format, "targets": list(targets), **options, **code(__name__)}
    asked |= {} if recipe is None else {"recipe": encode(recipe)}
    asked |= {} if folder is None else {"images": [sha256_of_file(p) for part in _split(folder, IMAGES) for p in part]}
    return sha256_of_bytes(json.dumps(asked, sort_keys=True).encode())


def _best(found: Any) -> float:
    return max((point.mean_db for point in found.frontier), default=0.0)


def _split(folder: Path, most: int) -> tuple[list[Path], list[Path]]:
    """The pictures to observe, and those to judge by."""
    paths = images_in(folder)
    if len(paths) < LEAST:
        raise InputError(
            f"{folder} holds {len(paths)} images; --calibrate needs {LEAST} or more, as it judges by some of them"
        )
    chosen = evenly(paths, most)
    judged = chosen[EACH - 1 :: EACH]
    return [path for path in chosen if path not in judged], judged


def _links(folder: Path, paths: list[Path]) -> Path:
    """A folder with these pictures alone."""
    folder.mkdir()
    for path in paths:
        (folder / path.name).symlink_to(path.absolute())
    return folder
