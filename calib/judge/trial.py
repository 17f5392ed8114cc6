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
from tilewright.calib.judge.likeness import psnr, relative, ssim
from tilewright.calib.recipe import Recipe
from tilewright.calib.recipe.layers import StandardGraph
from tilewright.runtime.bundle.manifest import Form
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.weights import location
from tilewright.runtime.engines import Engine
from tilewright.runtime.engines.ort import open_graph
from tilewright.runtime.errors import InputError
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.walk import Job, run_on
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.images.read import read_image
from tilewright.runtime.inputs import gather
from tilewright.runtime.plan.passes import least_px
from tilewright.runtime.restore import Restorer, load

__all__ = ["Recorded", "Score", "Trial"]

RECORDED = 2  # calls of a component, for timing
Floats = npt.NDArray[np.floating[Any]]
Notes = dict[tuple[int, str, str, int, int], list[Any]]  # picture, component, output, step, tile -> its numbers


@dataclass(frozen=True)
class Score:
    """How close pictures are to those of float32."""

    psnr_db: tuple[float, ...]  # of each picture
    ssim: tuple[float, ...]
    changed: float | None = None  # the share of choices that differ; none: no network makes choices
    drift: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # value that steps pass on -> at each step
    truth_db: tuple[float, ...] = ()  # PSNR against the original of each picture, if originals were given

    @property
    def mean(self) -> float:
        """The mean of the pictures, in dB."""
        return float(np.mean(self.psnr_db))

    @property
    def worst(self) -> float:
        """The worst picture, in dB."""
        return min(self.psnr_db)


@dataclass
class Recorded:
    """The calls of a component: the first few with their inputs and the names of outputs, and how many there were."""

    most: int
    first: list[tuple[dict[str, Any], list[str]]] = field(default_factory=list)
    count: int = 0


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
        originals: Sequence[Any] = (),
        **arguments: Any,
    ) -> None:
        self.bundle, self.threads, self.weights_dir = bundle, threads, weights_dir
        program, inputs = bundle.program, gather(bundle, arguments)
        self.jobs: list[Job] = []
        self.sizes: list[tuple[int, int]] = []  # of the pictures, without what is added at the bottom and the right
        for place, picture in enumerate(pictures):  # as `read_image` takes them
            pixels = read_image(picture).rgb
            enlarged = Enlarged(pixels, program.scale, program.multiple_px, least_px(program, tile))
            self.jobs.append(Job(enlarged, seed + place, tile, steps=steps, inputs=inputs))
            self.sizes.append((pixels.shape[0] * program.scale, pixels.shape[1] * program.scale))
        self.truth = [_original(truth, *size) for truth, size in zip(originals, self.sizes, strict=False)]
        self.noted = _noted(bundle)
        self.restorer: Restorer = load(bundle, engine="float32", threads=threads, weights_dir=weights_dir)
        self.folder = tempfile.TemporaryDirectory(prefix="tilewright-")
        self.reference, self.notes = self._restore({})

    def __enter__(self) -> "Trial":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.restorer.close()
        self.folder.cleanup()

    def _restore(
        self, engines: Mapping[str, Engine], recorded: Mapping[str, Recorded] | None = None
    ) -> tuple[list[Floats], Notes]:
        """The pictures, and the outputs that are noted."""
        used = {name: engines.get(name) or self.restorer.engines[name] for name in self.bundle.program.components()}
        pictures: list[Floats] = []
        notes = Notes()
        for job, (height, width) in zip(self.jobs, self.sizes, strict=True):
            device = _Noting(used, self.noted, recorded or {})
            picture = run_on([device], self.bundle.program, self.restorer.constants, job)
            notes |= {(len(pictures), *key): arrays for key, arrays in device.notes.items()}
            pictures.append(picture[:, :height, :width])
        return pictures, notes

    def calls(self, most: int = RECORDED) -> dict[str, Recorded]:
        """The calls of each component in float32, the inputs of so many at most."""
        recorded = {name: Recorded(most) for name in sorted(self.bundle.program.components())}
        self._restore({}, recorded)
        return recorded

    @property
    def megapixels(self) -> float:
        """The size of all pictures."""
        return sum(picture.shape[1] * picture.shape[2] for picture in self.reference) / 1e6

    def pictures(self, engines: Mapping[str, Engine]) -> tuple[list[Floats], Score]:
        """The pictures with these engines, and those of float32 for all other components, and how close they are."""
        pictures, notes = self._restore(engines)
        pairs = list(zip(pictures, self.reference, strict=True))
        changed = made = 0
        drifts: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
        for key, exact in self.notes.items():
            _, component, output, step, _ = key
            value = self.noted[component][output]
            for array, reference in zip(notes[key], exact, strict=True):
                if value is None:
                    changed, made = changed + int((array != reference).sum()), made + reference.size
                else:
                    drifts.setdefault((value, step), []).append((array, reference))
        drift: dict[str, tuple[float, ...]] = {}
        for value, step in sorted(drifts):
            drift[value] = (*drift.get(value, ()), relative(drifts[value, step]))
        return pictures, Score(
            tuple(psnr(*pair) for pair in pairs),
            tuple(ssim(*pair) for pair in pairs),
            changed / made if made else None,
            drift,
            tuple(psnr(picture, truth) for picture, truth in zip(pictures, self.truth, strict=False)),
        )

    def score(self, engines: Mapping[str, Engine]) -> Score:
        """How close the pictures with these engines are."""
        return self.pictures(engines)[1]

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


class _Noting(CpuDevice):
    """A CPU that notes some outputs of each step and tile, and records the first calls of components."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        noted: Mapping[str, Mapping[str, str | None]],
        recorded: Mapping[str, Recorded],
    ) -> None:
        super().__init__("cpu:0", engines)
        self.noted, self.recorded = noted, recorded
        self.rows: Sequence[tuple[int, int]] = ()
        self.notes: dict[tuple[str, str, int, int], list[Any]] = {}

    def begin(self, rows: Sequence[tuple[int, int]]) -> None:
        """Take the steps and tiles of the call that comes next."""
        self.rows = rows

    def run(self, component: str, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Run the component's engine, and note its outputs."""
        names, noted = list(outputs), self.noted.get(component, {})
        if record := self.recorded.get(component):
            record.count += 1
            if len(record.first) < record.most:
                record.first.append((dict(inputs), names))
        results = super().run(component, inputs, list(dict.fromkeys([*names, *noted])))
        for output in noted:
            whole = results[output]
            each = whole if len(whole) == len(self.rows) else [whole]
            for (step, tile), array in zip(self.rows, each, strict=False):
                self.notes.setdefault((component, output, step, tile), []).append(array)
        return {name: results[name] for name in names}


def _noted(bundle: Bundle) -> dict[str, dict[str, str | None]]:
    """Component -> the outputs to note -> the value that a step passes on with them; none: they are choices."""
    noted: dict[str, dict[str, str | None]] = {
        name: {output: None for output, spec in component.outputs.items() if spec.dtype.startswith("int")}
        for name, component in bundle.manifest.components.items()
    }
    for p in bundle.program.passes:  # other states are as large as the insides of a network
        sampled = {name for name, state in p.state.items() if state.init == "noise"} | bundle.program.grids.keys()
        for call in p.each:
            passed: dict[str, str | None] = {o: v for o, v in call.outputs.items() if v in sampled}
            noted[call.run] = passed | noted[call.run]
    return noted


def _original(picture: Any, height: int, width: int) -> Floats:
    """The planes of an original picture of this size."""
    rgb = read_image(picture).rgb
    if rgb.shape[:2] != (height, width):
        raise InputError(f"{picture} has {rgb.shape[1]}x{rgb.shape[0]} px, the restored picture {width}x{height}")
    return rgb.transpose(2, 0, 1) / np.float32(255)
