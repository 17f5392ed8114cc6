"""Restoring pictures with other engines for some components, and comparing them with the pictures of float32."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from tilewright.calib.insertion import Codes, insert, quantised_weights
from tilewright.calib.layers import StandardGraph
from tilewright.calib.recipe import Recipe
from tilewright.runtime.bundle.manifest import Form
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.weights import location
from tilewright.runtime.engines import Engine
from tilewright.runtime.engines.ort import open_graph
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.images.read import read_image
from tilewright.runtime.inputs import gather
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.restore import Restorer, load

__all__ = ["Recorded", "Score", "Trial", "differing", "psnr"]

MOST_DB = 200.0  # of equal pictures
RECORDED = 2  # calls of a component, for timing
Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Score:
    """How close pictures are to those of float32."""

    psnr_db: tuple[float, ...]  # of each picture
    changed: float | None = None  # the share of choices that differ; none: no network makes choices

    @property
    def mean(self) -> float:
        """The mean of the pictures, in dB."""
        return float(np.mean(self.psnr_db))

    @property
    def worst(self) -> float:
        """The worst picture, in dB."""
        return min(self.psnr_db)

    @property
    def error(self) -> float:
        """The mean squared error of all pictures."""
        return float(np.mean([10 ** (-db / 10) for db in self.psnr_db]))


def psnr(ours: Floats, reference: Floats) -> float:
    """The likeness of two pictures with numbers from 0 to 1, in dB."""
    error = float(np.mean((np.clip(ours, 0, 1).astype(np.float64) - np.clip(reference, 0, 1)) ** 2))
    return MOST_DB if error == 0 else min(MOST_DB, -10 * float(np.log10(error)))


def differing(ours: Sequence[Any], reference: Sequence[Any]) -> int:
    """How many choices differ. Calls come in any order, so each is compared with the one that is most like it."""
    left, count = list(reference), 0
    for array in ours:
        counts = [int((array != other).sum()) if array.shape == other.shape else array.size for other in left]
        best = int(np.argmin(counts))
        count += counts[best]
        left.pop(best)
    return count


class Trial:
    """Pictures that were restored in float32, with which others are compared. A context manager."""

    def __init__(
        self,
        bundle: Bundle,
        pictures: Sequence[Any],
        *,
        steps: int | None = None,
        tile: int | None = None,
        seed: int = 0,
        threads: int = 0,
        weights_dir: Path | None = None,
        **arguments: Any,
    ) -> None:
        self.bundle, self.threads, self.weights_dir = bundle, threads, weights_dir
        self.restorer: Restorer = load(bundle, engine="float32", threads=threads, weights_dir=weights_dir)
        self.folder = tempfile.TemporaryDirectory(prefix="tilewright-")
        program, inputs = bundle.program, gather(bundle, arguments)
        self.jobs = []
        for place, picture in enumerate(pictures):  # as `read_image` takes them
            pixels = read_image(picture).rgb
            enlarged = Enlarged(pixels, program.scale, program.multiple_px, least_px(program, tile))
            self.jobs.append(Job(enlarged, seed + place, tile, steps=steps, inputs=inputs))
        self.choices = {
            name: [output for output, spec in component.outputs.items() if spec.dtype.startswith("int")]
            for name, component in bundle.manifest.components.items()
        }
        self.reference, self.chosen = self._restore({})

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restorer.close()
        self.folder.cleanup()

    def _restore(self, engines: Mapping[str, Engine]) -> tuple[list[Floats], list[Any]]:
        """The pictures, and all choices."""
        chosen: list[Any] = []
        used: dict[str, Engine] = {}
        for name in sorted(self.bundle.program.components()):
            engine = engines.get(name) or self.restorer.engines[name]
            used[name] = _Choosing(engine, self.choices[name], chosen) if self.choices[name] else engine
        pictures = [run(self.bundle.program, used, self.restorer.constants, job) for job in self.jobs]
        return [np.asarray(picture) for picture in pictures], chosen

    def calls(self) -> dict[str, "Recorded"]:
        """The calls of each component in float32."""
        recorded = {name: Recorded() for name in sorted(self.bundle.program.components())}
        self._restore({name: _Recording(self.restorer.engines[name], calls) for name, calls in recorded.items()})
        return recorded

    @property
    def megapixels(self) -> float:
        """The size of all pictures."""
        return sum(picture.shape[1] * picture.shape[2] for picture in self.reference) / 1e6

    def score(self, engines: Mapping[str, Engine]) -> Score:
        """The pictures with these engines, and those of float32 for all other components."""
        pictures, chosen = self._restore(engines)
        likeness = tuple(psnr(p, r) for p, r in zip(pictures, self.reference, strict=True))
        total = sum(array.size for array in self.chosen)
        return Score(likeness, differing(chosen, self.chosen) / total if total else None)

    def weights(self, graphs: Mapping[str, StandardGraph], recipe: Recipe) -> dict[str, Codes]:
        """The weights of a recipe, written into a folder that lasts as long as the trial."""
        return quantised_weights(graphs, recipe, Path(self.folder.name) / recipe.format, recipe.format)

    def score_of(self, graphs: Mapping[str, StandardGraph], recipe: Recipe, codes: Mapping[str, Codes]) -> Score:
        """The pictures of a recipe, computed by ONNX Runtime."""
        names = sorted({name.partition("/")[0] for name in recipe.quantised})
        engines = {name: self.open(graphs[name], recipe, codes) for name in names}
        try:
            return self.score(engines)
        finally:
            for engine in engines.values():
                engine.close()

    def open(
        self, graph: StandardGraph, recipe: Recipe, codes: Mapping[str, Codes], form: Form | None = None
    ) -> Engine:
        """A component's quantised graph, opened by ONNX Runtime."""
        path = Path(self.folder.name) / "trial.onnx"
        ir.save(insert(graph, recipe, codes, form), path)
        files = self.files(graph.component, codes.values())
        return open_graph(path, files, precision=recipe.format, threads=self.threads, native=False)

    def files(self, component: str, codes: Iterable[Codes]) -> dict[str, Path]:
        """Location in a quantised graph -> the file."""
        files = self.bundle.files_of(component, self.weights_dir)
        return files | {location(c.reference): c.path for c in codes}


class _Choosing:
    """An engine whose choices are noted."""

    def __init__(self, engine: Engine, outputs: Sequence[str], chosen: list[Any]) -> None:
        self.engine, self.outputs, self.chosen = engine, outputs, chosen

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        names = list(outputs)
        results = self.engine.run(inputs, list(dict.fromkeys([*names, *self.outputs])))
        self.chosen += [results[name] for name in self.outputs]
        return {name: results[name] for name in names}

    def close(self) -> None:
        """The engine belongs to others."""


@dataclass
class Recorded:
    """The calls of a component: the first few with their inputs and the names of outputs, and how many there were."""

    first: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    count: int = 0


class _Recording:
    """An engine whose calls are noted."""

    def __init__(self, engine: Engine, calls: Recorded) -> None:
        self.engine, self.calls = engine, calls

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        names = list(outputs)
        self.calls.count += 1
        if len(self.calls.first) < RECORDED:
            self.calls.first.append((dict(inputs), names))
        return self.engine.run(inputs, names)

    def close(self) -> None:
        """The engine belongs to others."""
