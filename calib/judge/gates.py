"""The gate: engines in 8 bits, judged by held-out pictures, beside the float engines of the same bundle.

No picture may be one that the recipe was made from. The times of all engines are taken in one run, by turns.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tilewright.calib.judge.crops import Crops
from tilewright.calib.judge.peak import peak_of
from tilewright.calib.judge.profiled import low_layers, low_share
from tilewright.calib.judge.trial import Recorded, Score, Trial
from tilewright.calib.pictures import images_in
from tilewright.calib.recipe import IN_BUNDLE, Recipe, read_recipe
from tilewright.export.verify.engines import runnable
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.measured import Measured, Measurement
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.engines.machine import processor, usable_cores
from tilewright.runtime.errors import AccuracyError, InputError, UsageError
from tilewright.runtime.images.read import SUFFIXES, read_image
from tilewright.runtime.restore import Restorer, load

__all__ = ["BUDGET_DB", "CROPS", "EIGHT_BITS", "REPORT", "gate", "held_out", "measurement", "original_of", "require"]

BUDGET_DB = 45.0
REPORT = "reports/quantised.json"  # in the bundle
ROUNDS = 3  # of timing
CROPS = "reports/quantised"
EIGHT_BITS = ("int8", "fp8")
Report = Callable[[str, int, int], None]


def held_out(folder: Path, recipe: Recipe, most: int | None = None) -> list[Path]:
    """The pictures of a folder that the recipe was not made from."""
    paths = images_in(folder)
    fresh = [path for path in paths if sha256_of_file(path) not in recipe.images]
    if not fresh:
        seen = "no image" if not paths else f"only {len(paths)} images that were calibrated on"
        raise InputError(f"{folder} holds {seen}; give others, as the result must not be judged on those")
    return fresh[:most]


def original_of(path: Path, folder: Path) -> Path:
    """The original of a picture: the image in this folder with the same name but for the suffix."""
    for suffix in SUFFIXES:
        for original in (folder / f"{path.stem}{suffix}", folder / f"{path.stem}{suffix.upper()}"):
            if original.is_file():
                return original
    raise InputError(f"{folder} holds no original of {path.name}; name it {path.stem}.png")


def gate(
    root: Path,
    folder: Path,
    *,
    budget_db: float = BUDGET_DB,
    precision: str | None = None,
    most: int | None = None,
    steps: int | None = None,
    tile: int | None = None,
    seed: int = 0,
    threads: int = 0,
    expect: str | None = None,
    weights_dir: Path | None = None,
    originals: Path | None = None,
    crops: Path | None = None,
    on_progress: Report = lambda part, done, total: None,
    **arguments: Any,
) -> dict[str, Any]:
    """Judge the engines in 8 bits of a bundle on the held-out pictures of a folder, and return a report.

    `originals`: a folder with the picture that each one was made from, of the size of the restored one, under the same
    name but for the suffix. `crops`: a folder that gets a part of the picture that suffered most, by every engine.
    `arguments` are the bundle's, such as a prompt.
    """
    bundle = read_bundle(root, expect=expect)
    recipes = {
        p: read_recipe(file)
        for p in EIGHT_BITS
        if (file := bundle.root / IN_BUNDLE.format(p)).is_file() and p in (precision or p)
    }
    if not recipes:
        wanted = precision or "int8 or fp8"
        raise UsageError(f"{root} has no engine in {wanted}; add one with 'export compile --recipe'")
    paths = held_out(folder, next(iter(recipes.values())), most)
    truth = [] if originals is None else [original_of(path, originals) for path in paths]
    loading: dict[str, Any] = {"threads": threads, "weights_dir": weights_dir}
    restoring: dict[str, Any] = {"steps": steps, "tile": tile, "seed": seed, **arguments}
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "processor": processor(),
        "threads": threads or usable_cores(),
        "images": [path.name for path in paths],
        "budget_db": budget_db,
        "engines": {},
    }
    names, _ = runnable(bundle)
    peaks = {}
    for place, name in enumerate(names):  # before this process holds all of them
        on_progress("memory", place, len(names))
        peaks[name] = peak_of(root, name, paths[0], loading, restoring)
    on_progress("memory", len(names), len(names))
    with Trial(bundle, paths, originals=truth, **loading, **restoring) as trial:
        restorers: dict[str, Restorer] = {}
        shown = Crops([read_image(path).rgb for path in paths], trial.reference, trial.truth)
        try:
            for name in names:
                restorers[name] = load(bundle, engine=name, **loading)
            calls = trial.calls()
            for place, (name, restorer) in enumerate(restorers.items()):
                on_progress("pictures", place, len(names))
                specs = {c: s for c, s in restorer.specs.items() if s.name == name}
                pictures, score = trial.pictures({c: restorer.engines[c] for c in specs})
                if (kind := next(iter(specs.values())).precision) != "float32":
                    shown.add(name, pictures, judged=kind in EIGHT_BITS)
                report["engines"][name] = _judged(bundle, name, specs, restorer, score, recipes, calls, weights_dir)
            on_progress("pictures", len(names), len(names))
            seconds = _times(restorers, calls, trial, on_progress)
        finally:
            for restorer in restorers.values():
                restorer.close()
    if crops is not None:
        report["crops"] = shown.write(crops)
    exact = report["engines"][names[0]].get("truth_db")
    for name, engine in report["engines"].items():
        engine["peak_bytes"] = peaks[name]
        if exact is not None:  # against the originals, how much worse than float32
            engine["lost_db"] = float(np.mean(exact) - np.mean(engine["truth_db"]))
        engine["seconds_per_megapixel"] = {c: seconds[name][c] for c in engine["components"]}
        engine["seconds"] = sum(seconds[name].values())  # a megapixel, with other engines where it has none
    for engine in report["engines"].values():
        if engine["precision"] in EIGHT_BITS:
            engine["fault"] = _fault(engine, budget_db)
            engine["slower_than"] = _faster(report["engines"], engine)
    return report


def _judged(
    bundle: Bundle,
    name: str,
    specs: Mapping[str, EngineSpec],
    restorer: Restorer,
    score: Score,
    recipes: Mapping[str, Recipe],
    calls: Mapping[str, Recorded],
    weights_dir: Path | None,
) -> dict[str, Any]:
    spec = next(iter(specs.values()))
    judged: dict[str, Any] = {
        "backend": spec.backend,
        "version": backend(spec.backend).version(),
        "precision": spec.precision,
        "components": sorted(specs),
        "psnr_db": list(score.psnr_db),
        "mean_db": score.mean,
        "worst_db": score.worst,
        "ssim": float(np.mean(score.ssim)),
        "drift": {value: list(steps) for value, steps in score.drift.items()},
        "changed_choices": score.changed,
    }
    if score.truth_db:
        judged["truth_db"] = list(score.truth_db)
    if recipe := recipes.get(spec.precision):
        low = set[str]()
        for component, its in specs.items():
            engine, call = restorer.engines[component], calls[component].first[0]
            low |= low_layers(bundle, component, its, engine, recipe, call, weights_dir)
        judged |= {
            "asked_share": recipe.share("linear"),
            "low_share": low_share(recipe, low, "linear"),
            "low_share_of_all": low_share(recipe, low),
            "forms": {component: its.form.text for component, its in specs.items() if its.form},
        }
    return judged


def _times(
    restorers: Mapping[str, Restorer], calls: Mapping[str, Recorded], trial: Trial, on_progress: Report
) -> dict[str, dict[str, float]]:
    """Engine -> component -> seconds for a megapixel of the result, over the recorded calls; engines take turns."""
    spent: dict[str, dict[str, list[float]]] = {name: {c: [] for c in r.specs} for name, r in restorers.items()}
    for turn in range(ROUNDS):
        on_progress("times", turn, ROUNDS)
        for component, of_component in calls.items():
            for name, restorer in restorers.items():
                engine: Engine = restorer.engines[component]
                start = time.perf_counter()
                for inputs, outputs in of_component.first:
                    engine.run(inputs, outputs)
                spent[name][component].append(time.perf_counter() - start)
    on_progress("times", ROUNDS, ROUNDS)
    scale = {c: r.count / max(1, len(r.first)) / trial.megapixels for c, r in calls.items()}  # the first stand for all
    return {name: {c: median(t) * scale[c] for c, t in of.items() if t} for name, of in spent.items()}


def _fault(engine: Mapping[str, Any], budget_db: float) -> str | None:
    if engine["mean_db"] >= budget_db:
        return None
    return f"{engine['mean_db']:.1f} dB against float32, the budget is {budget_db:g} dB; keep more layers in float"


def _faster(engines: Mapping[str, Mapping[str, Any]], engine: Mapping[str, Any]) -> str | None:
    """The fastest engine in float that is faster than this one."""
    floats = {name: e["seconds"] for name, e in engines.items() if e["precision"] not in EIGHT_BITS}
    best = min(floats, key=floats.__getitem__)
    return best if floats[best] < engine["seconds"] else None


def measurement(report: Mapping[str, Any]) -> Measurement:
    """The part of a report that engines are chosen by."""
    components: dict[str, dict[str, Measured]] = {}
    for name, engine in report["engines"].items():
        for component, seconds in engine["seconds_per_megapixel"].items():
            error = 10 ** (-engine["mean_db"] / 20)
            measured = Measured(error, seconds, engine["mean_db"])
            components.setdefault(component, {})[name] = measured
    versions = {engine["backend"]: engine["version"] for engine in report["engines"].values()}
    return Measurement(report["processor"], report["threads"], versions, components)


def require(report: Mapping[str, Any]) -> None:
    """Refuse a report with no engine in 8 bits that meets the budget; the error tells the best."""
    judged = {name: e for name, e in report["engines"].items() if e["precision"] in EIGHT_BITS}
    if missed := {name: e for name, e in judged.items() if e["fault"]}:
        best = max(missed, key=lambda name: missed[name]["mean_db"])
        if len(missed) == len(judged):
            raise AccuracyError(f"{best}, the best in 8 bits: {missed[best]['fault']}")
