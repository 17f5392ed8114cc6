"""Whether ranges of their own for early and late steps bring pictures closer to float32 than one range for all steps.

Two engines of the `step` component differ in the ranges of what enters their layers, and the step's `sigma` decides
which one runs. BUNDLE is a build of in-token's demo, STATISTICS and RECIPE are of its calibration. Prints JSON.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from eight_bits import SIDE, pictures

from tilewright.calib import read_observations, read_recipe
from tilewright.calib.judge.trial import Trial
from tilewright.calib.observe.observers import Observations
from tilewright.calib.recipe import FORMATS, Recipe
from tilewright.calib.recipe.make import graphs_of, make_recipe
from tilewright.calib.scales.ranges import range_of
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.plan.schedules import SCHEDULES

STEPS = 8
SPLITS = ((), (4,), (2, 4, 6))  # the first steps of further ranges


class Switching:
    """Engines that take turns: each serves the steps from its sigma down to that of the next."""

    def __init__(self, engines: Sequence[Any], sigmas: Sequence[float]) -> None:
        self.engines, self.sigmas = engines, sigmas  # of the first step of each engine but the first

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        sigma = float(np.asarray(inputs["sigma"]).flat[0])
        place = sum(sigma <= first + 1e-6 for first in self.sigmas)
        result: dict[str, Any] = self.engines[place].run(inputs, list(outputs))
        return result

    def close(self) -> None:
        for engine in self.engines:
            engine.close()


def within(observed: Observations, start: int, stop: int) -> Observations:
    """What was seen at these steps, and of tensors that were seen at one step only."""
    seen = {
        (tensor, step): observation
        for (tensor, step), observation in observed.seen.items()
        if start <= step < stop or len(observed.steps(tensor)) == 1
    }
    return Observations(seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("statistics", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--images", type=int, default=4)
    arguments = parser.parse_args()
    bundle, searched = read_bundle(arguments.bundle), read_recipe(arguments.recipe)
    observed, facts = read_observations(arguments.statistics)
    graphs = graphs_of(bundle)
    smooth = 0.5 if any(entering.factors for entering in searched.inputs.values()) else None
    (sample,) = (p for p in bundle.program.passes if p.name == "sample")
    assert sample.steps and sample.tiles
    tokens = sample.tiles.px**2 // sample.steps.px_per_token
    schedule = SCHEDULES[sample.steps.schedule](STEPS, tokens, **sample.steps.options)
    sigmas = [float(np.asarray(row).flat[0]) for row in schedule["sigma"]]
    whole = make_recipe(bundle, observed, facts, searched.format, smooth=smooth, graphs=graphs)
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        paths, _ = pictures("held-out", SIDE, arguments.images, Path(temporary) / "held-out")
        with Trial(bundle, paths, steps=STEPS) as trial:
            for name, kept in (("all layers", set()), ("searched", whole.quantised - searched.quantised)):
                recipe = whole.keeping(kept, "")
                for split in SPLITS:
                    bounds = [0, *split, STEPS]
                    parts = [within(observed, *steps) for steps in pairwise(bounds)]
                    recipes = [ranged(recipe, part) for part in parts]
                    codes = trial.weights(graphs, recipe)  # of all ranges
                    opened = [
                        {
                            c: trial.open(graphs[c], of_range, codes)
                            for c in sorted({layer.partition("/")[0] for layer in recipe.quantised})
                        }
                        for of_range in recipes
                    ]
                    engines = dict(opened[0])
                    engines["step"] = Switching([of["step"] for of in opened], [sigmas[at] for at in split])
                    score = trial.score(engines)
                    results.append({"layers": name, "from_steps": [0, *split], "mean_db": score.mean})
                    results[-1] |= {"worst_db": score.worst, "drift": score.drift["z"]}
                    print(results[-1], file=sys.stderr, flush=True)
    print(json.dumps({"images": len(paths), "steps": STEPS, "format": searched.format, "ranges": results}, indent=1))


def ranged(recipe: Recipe, observed: Observations) -> Recipe:
    """The recipe with the ranges of these observations, and the same smoothing, as engines share the weights."""
    inputs, format = dict(recipe.inputs), FORMATS[recipe.format]
    for name, entering in inputs.items():
        tensor, _, rows = name.partition("[")
        seen = observed.over(tensor)
        if seen.channels is not None and (rows or entering.factors):
            start, _, stop = rows.rstrip("]").partition(":")
            channels = seen.channels[int(start or 0) : int(stop) if stop else None]
            most = float((channels / np.asarray(entering.factors or 1.0)).max())
            inputs[name] = replace(entering, range=(max(-most, entering.range[0]), most))
        else:
            inputs[name] = replace(entering, range=range_of(seen.histogram, format, entering.method))
    return replace(recipe, inputs=inputs)


if __name__ == "__main__":
    main()
