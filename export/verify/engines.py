"""Comparing engines with eager PyTorch on the same inputs: every call of a restoration, and the picture at the end.

A component whose outputs are choices (integers) must make the same choices. A choice may differ if the two best scores
differ by less than their rounding; values that follow from a different choice are not compared.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from tilewright.export.verify.eager import Eager, eager_network
from tilewright.export.verify.memory import VERIFY_COPIES
from tilewright.export.verify.repeat import Calls, Watched, commands
from tilewright.export.verify.seams import PICTURES, seam_excess
from tilewright.export.verify.speed import seconds_of
from tilewright.runtime.bundle.manifest import PRECISIONS
from tilewright.runtime.bundle.measured import PSNR_GATE, Measured, Measurement
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.engines.choose import choose_all
from tilewright.runtime.engines.choose import require as require_engines
from tilewright.runtime.engines.machine import processor, this_machine, usable_cores
from tilewright.runtime.engines.trust import strangers
from tilewright.runtime.errors import AccuracyError, ResourceError, TilewrightError, UsageError
from tilewright.runtime.execute.walk import Job, run
from tilewright.runtime.images.canvas import Enlarged
from tilewright.runtime.inputs import gather
from tilewright.runtime.memory.machine import available_bytes
from tilewright.runtime.plan.passes import least_px, plan_of
from tilewright.runtime.restore import Restorer, load
from tilewright.runtime.text import token_ids

__all__ = ["PARTS", "RELATIVE_L2_GATE", "measurement", "require", "runnable", "sample_photo", "verify"]

RELATIVE_L2_GATE = 1e-4  # for float outputs of a component, in float32; measured are 1e-6 to 1e-5
SMALL = 2**24  # a bundle with fewer parameters is small
WORDS = "a stone bridge over a river"
FEW_STEPS = 8  # sampling steps when engines are compared
SEAM_STEPS = 4  # sampling steps when seams are judged; each step joins the tiles
SMALL_SEAM_STEPS = 2  # for small networks: the second step reads joined tiles, and seams show as much as after 4
LEAST_TILE_PX = 96  # side of tiles when seams are judged: convolutions reach further than 12 of the smallest tokens
SEAM_GATE = 0.15  # for `seam_excess`: blended tiles of random networks reach 0.09, averaged ones of the demo 0.4
UNDECIDED = 4.0  # a choice may differ if its scores differ by fewer roundings
PARTS = (
    "engines and eager",
    "engines",
    *(f"seams, {name}" for name in (*PICTURES, "photo")),
)  # parts of a verification, for progress
Floats = npt.NDArray[np.floating[Any]]
Pixels = npt.NDArray[np.uint8]
Report = Callable[[str, int, int], None]  # called with one of PARTS, and the finished and total amount of it


def verify(
    root: Path,
    *,
    weights_dir: Path | None = None,
    size_px: int | None = None,
    expect: str | None = None,
    fresh: bool = True,
    on_progress: Report = lambda part, done, total: None,
) -> dict[str, Any]:
    """Compare a bundle's engines with the networks that they were traced from, and return a report.

    With `fresh` the digest of every file is computed anew. The picture is a square of `size_px` in the program's tiles,
    or by default a small picture in smaller tiles.
    """
    bundle = read_bundle(root, expect=expect, fresh=fresh)
    names, skipped = runnable(bundle)
    small = _parameters(bundle) < SMALL
    # in a small network, threads would mostly wait for each other, so tiles run at the same time instead
    threads, devices = (1, [f"cpu:{i}" for i in range(usable_cores())]) if small else (0, ["cpu:0"])
    _require_memory(bundle, len(names))
    with _torch_threads(threads), contextlib.ExitStack() as stack:
        restorers = {
            name: stack.enter_context(
                load(bundle, engine=name, threads=threads, devices=devices, weights_dir=weights_dir)
            )
            for name in names
        }
        judge, program = restorers[names[0]], bundle.program
        pairs = {
            n: _Paired(_alike(restorers, n), eager_network(bundle, n, weights_dir))
            for n in sorted(program.components())
        }
        job = _job(judge, size_px)
        job.inputs = gather(bundle, example_inputs(bundle))
        calls = Calls()
        with _repeatable(root, calls):
            watched = {n: Watched(pair, n, calls) for n, pair in pairs.items()}
            eager_image = run(program, watched, judge.constants, _told(job, on_progress, PARTS[0], program))
            images, seconds = {}, {}
            for i, (name, restorer) in enumerate(restorers.items()):  # after a call of each size, as the first is slow
                timed = _told(job, on_progress, PARTS[1], program, i, len(restorers))
                watched = {n: Watched(engine, n, calls) for n, engine in restorer.engines.items()}
                images[name] = run(program, watched, restorer.constants, timed)
                seconds[name] = timed.seconds
        threads, megapixels = judge.threads, eager_image.shape[1] * eager_image.shape[2] / 1e6
        if small and len(names) > 1:  # above, each had one thread and small tiles
            tile = _one_tile(judge, job.inputs)
            threads, seconds = seconds_of(bundle, names, tile, weights_dir)
            megapixels = tile.image.shape[1] * tile.image.shape[2] / 1e6
        few = _few_steps(judge, SMALL_SEAM_STEPS if small else SEAM_STEPS)
        pictures = (PICTURES | {"photo": _photo}).items()
        seams = {
            name: _seam(judge, _told(job, on_progress, f"seams, {name}", program), few, make) for name, make in pictures
        }
        specs = {name: next(s for s in r.specs.values() if s.name == name) for name, r in restorers.items()}
    report: dict[str, Any] = {
        "bundle": bundle.digest,
        "reference": f"torch {torch.__version__} eager, float32",
        "image": f"{job.image.shape[2]}x{job.image.shape[1]} px in tiles of {job.tile_px or 'the program'}",
        "steps": job.steps or max(p.steps.count if p.steps else 1 for p in program.passes),
        "processor": processor(),
        "threads": threads,
        "engines": {
            name: {
                "backend": spec.backend,
                "version": backend(spec.backend).version(),
                "precision": spec.precision,
                "components": {
                    component: pair.report(name)
                    | {"seconds_per_megapixel": seconds[name].get(component, 0) / megapixels}
                    | {"shapes": calls.last.get(component, {})}
                    for component, pair in pairs.items()
                    if name in pair.engines
                },
                "restore": _difference(images[name], eager_image) | {"deviation": float(images[name].std())},
            }
            for name, spec in specs.items()
        },
        "skipped": skipped,
        "seams": seams,
        "gate": {"relative_l2": RELATIVE_L2_GATE, "psnr_db": PSNR_GATE, "seam_excess": SEAM_GATE},
    }
    for engine in report["engines"].values():
        engine["fault"] = _fault(engine)
    return report


@contextlib.contextmanager
def _repeatable(root: Path, calls: Calls) -> Iterator[None]:
    """Add to an error the commands that repeat the first call that failed."""
    try:
        yield
    except TilewrightError as error:
        for component, shapes in [*calls.failed.items()][:1]:
            error.repeat = commands(root, component, shapes)
        raise


def runnable(bundle: Bundle) -> tuple[list[str], dict[str, str]]:
    """The names of the engines that can run here, the most accurate precision first, and for the others why not."""
    components = {name: bundle.manifest.components[name] for name in bundle.program.components()}
    specs = {spec.name: spec for component in components.values() for spec in component.engines}
    machine = this_machine({package for spec in specs.values() for package in spec.needs.packages})
    choices = choose_all(components, machine, strange=strangers(bundle.manifest))
    skipped = {name: reason for choice in choices.values() for name, reason in choice.misfits.items()}
    names = sorted(specs.keys() - skipped.keys(), key=lambda name: (PRECISIONS.index(specs[name].precision), name))
    if not names:
        require_engines(choices)
    return names, dict(sorted(skipped.items()))


def _alike(restorers: Mapping[str, Restorer], component: str) -> dict[str, Engine]:
    """The engines of a component, without those that stand in for an engine that the component lacks."""
    return {name: r.engines[component] for name, r in restorers.items() if r.specs[component].name == name}


def measurement(report: Mapping[str, Any]) -> Measurement:
    """The part of a report that engines are chosen by."""
    components: dict[str, dict[str, Measured]] = {}
    for name, engine in report["engines"].items():
        if engine["precision"] == "float32" and engine["fault"]:
            continue
        for component, c in engine["components"].items():
            error = max((output["relative_l2"] for output in c["outputs"].values()), default=0.0)
            components.setdefault(component, {})[name] = Measured(
                error, c["seconds_per_megapixel"], engine["restore"]["psnr_db"]
            )
    versions = {engine["backend"]: engine["version"] for engine in report["engines"].values()}
    return Measurement(report["processor"], report["threads"], versions, components)


def _told(job: Job, report: Report, part: str, program: Program, index: int = 0, count: int = 1) -> Job:
    """The job with times of its own. It reports its progress as the part with this index of so many."""
    percent = _percent(report, part, program, index, count)
    return replace(job, seconds={}, on_progress=percent)


def _percent(report: Report, part: str, program: Program, index: int, count: int) -> Report:
    """Report the finished share of one of `count` restorations, as if all passes took the same time."""
    names = [p.name for p in program.passes]

    def tell(name: str, done: int, total: int) -> None:
        share = (names.index(name) + done / total) / len(names)
        report(part, round(100 * (index + share) / count), 100)

    return tell


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parameters(bundle: Bundle) -> int:
    return sum(math.prod(r.shape) for references in bundle.weights.tensors.values() for r in references.values())


def _require_memory(bundle: Bundle, engines: int) -> None:
    """Refuse early if memory is too small: the system would kill the process."""
    needed, free = 4 * (VERIFY_COPIES + engines - 1) * _parameters(bundle), available_bytes()
    if free is not None and needed > free:
        raise ResourceError(
            f"{bundle.root}: verifying needs about {needed / 2**30:.0f} GiB of memory, {free / 2**30:.0f} GiB are"
            " free; use a larger machine"
        )


def _seam(restorer: Restorer, job: Job, steps: int | None, make: Callable[[int, int], Pixels]) -> float:
    """The seams of a picture of 3 x 3 tiles that overlap by a third, after so many steps."""
    program = restorer.bundle.program
    fixed = job.tile_px is not None and least_px(program, job.tile_px) == job.tile_px
    usual = min(p.tiles.px for p in program.passes if p.tiles)
    tile = job.tile_px if fixed and job.tile_px else min(max(12 * program.multiple_px, LEAST_TILE_PX), usual)
    if not fixed:  # a third must be whole tokens; larger tiles would show the same seams
        tile = max(tile // (3 * program.multiple_px), 1) * 3 * program.multiple_px
    overlap = tile // 3 // program.multiple_px * program.multiple_px
    whole = 3 * tile - 2 * overlap
    side = -(-whole // program.scale)
    enlarged = Enlarged(make(side, side), program.scale, program.multiple_px, least_px(program, tile))
    tiled = replace(job, image=enlarged, tile_px=tile, overlap_px=overlap, steps=steps)
    devices = len(restorer.executor.devices)
    image = run(program, restorer.engines, restorer.constants, tiled, devices=devices)
    last = [p for p in program.passes if "result" in p.writes()][-1]
    plan = plan_of(program, last, image.shape[1], image.shape[2], tile, overlap)
    excess = seam_excess(image, plan, program.multiple_px)
    if fixed or excess <= SEAM_GATE:
        return excess
    direct = run(program, restorer.engines, restorer.constants, replace(tiled, tile_px=whole, overlap_px=0))
    direct_excess = seam_excess(direct, plan, program.multiple_px)
    return excess - max(direct_excess, 0)  # changes that one tile shows too belong to the picture


def _photo(width: int, height: int) -> Pixels:
    return sample_photo(width, height, 1)


def _few_steps(restorer: Restorer, few: int) -> int | None:
    """This many steps, or none if tables in the bundle fix the program's number of steps."""
    calls = [c for p in restorer.bundle.program.passes for *_, c in p.calls()]
    tables = {source[1:] for c in calls for source in c.inputs.values() if source[0] == "@"}
    return None if any(name.partition(".")[0] in tables for name in restorer.constants) else few


def _job(restorer: Restorer, size_px: int | None) -> Job:
    program = restorer.bundle.program
    multiple = program.multiple_px
    fixed = min((px for p in program.passes if p.tiles for px in p.tiles.fixed_px), default=None)
    tile, overlap = (fixed, None) if fixed else (6 * multiple, 2 * multiple)
    width, height = (size_px, size_px) if size_px else (tile + 4 * multiple, tile + multiple)
    image = Enlarged(sample_photo(width, height, program.scale), program.scale, multiple, fixed or 1)
    return (
        Job(image) if size_px else Job(image, tile_px=tile, overlap_px=overlap, steps=_few_steps(restorer, FEW_STEPS))
    )


def _one_tile(restorer: Restorer, inputs: dict[str, Any]) -> Job:
    """A job of one tile of the usual size."""
    program = restorer.bundle.program
    side = min(p.tiles.px for p in program.passes if p.tiles)
    image = Enlarged(sample_photo(side, side, program.scale), program.scale, program.multiple_px, 1)
    return Job(image, steps=_few_steps(restorer, SMALL_SEAM_STEPS), inputs=inputs)


def require(report: Mapping[str, Any], precisions: Collection[str] = PRECISIONS, root: Path | None = None) -> None:
    """Refuse a report with an engine of these precisions that misses its gate, and tiles that show.

    With `root`, the place of the bundle, the error has the commands that repeat the component.
    """
    for name, engine in report["engines"].items():
        if engine["precision"] in precisions and (fault := _fault(engine)):
            refusal = AccuracyError(f"{name}: {fault}")
            missed = next((component for component, _ in _misses(engine["components"])), None)
            if root is not None and missed is not None:
                refusal.repeat = commands(root, missed, engine["components"][missed]["shapes"])
            raise refusal
    for picture, excess in report["seams"].items():
        if not excess <= SEAM_GATE:
            raise AccuracyError(
                f"tiles show on the {picture} picture: it changes {excess:.0%} more across their borders than beside"
                f" them, the gate is {SEAM_GATE:.0%}; use a larger overlap"
            )


def _fault(engine: Mapping[str, Any]) -> str | None:
    """The reason why an engine misses its gate, or gives a constant or infinite picture; none if it passes."""
    if not engine["restore"]["deviation"] > 1e-4:  # written this way, NaN fails
        deviation = engine["restore"]["deviation"]
        return f"the restored picture is constant or not finite (deviation {deviation:.1e}); check the weights"
    if engine["precision"] != "float32":
        psnr = engine["restore"]["psnr_db"]
        return (
            None
            if psnr >= PSNR_GATE
            else f"the restored picture has {psnr:.1f} dB against eager PyTorch in float32, the gate is"
            f" {PSNR_GATE:.0f} dB; use an engine in float32, or judge the pictures and ask for this engine"
        )
    return next((fault for _, fault in _misses(engine["components"])), None)


def _misses(components: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The components that miss the gate of float32, and why."""
    for name, component in components.items():
        for output, difference in component["outputs"].items():
            if not difference["relative_l2"] <= RELATIVE_L2_GATE:
                yield (
                    name,
                    f"{name}.{output}: relative L2 {difference['relative_l2']:.2e} against eager PyTorch, the gate is"
                    f" {RELATIVE_L2_GATE:.0e}; compare the versions of torch and the engine with the manifest's",
                )
        if component.get("choices", {}).get("wrong"):
            yield (
                name,
                f"{name}: {component['choices']['wrong']} of {component['choices']['total']} choices differ from eager"
                " PyTorch by more than rounding explains; compare the versions of torch and the engine",
            )


def example_inputs(bundle: Bundle) -> dict[str, Any]:
    """A value for every input without a default: words, or seeded numbers."""
    program = bundle.program
    of_words = {name for text in program.texts.values() for name in text.ids}
    generator = np.random.Generator(np.random.Philox(key=2))
    inputs: dict[str, Any] = {name: _fitting_words(bundle, name) for name in program.texts}
    for name, spec in program.inputs.items():
        if spec.default is None and name not in of_words:
            inputs[name] = generator.standard_normal(spec.shape).astype(spec.dtype)
    return inputs


def _fitting_words(bundle: Bundle, name: str) -> str:
    """As many words as fit into the encoders of a text; small encoders take few."""
    words, lengths = WORDS.split(), {i: bundle.program.inputs[i].shape[1] for i in bundle.program.texts[name].ids}
    for count in range(len(words), 0, -1):
        with contextlib.suppress(UsageError):
            for i, tokenizer in bundle.program.texts[name].ids.items():
                token_ids(bundle.path(tokenizer), " ".join(words[:count]), lengths[i])
            return " ".join(words[:count])
    return ""


def sample_photo(width: int, height: int, scale: int) -> npt.NDArray[np.uint8]:
    """A picture with edges, gradients and texture, whose enlargement by `scale` has this size."""
    columns, rows = -(-width // scale), -(-height // scale)
    y, x = np.mgrid[0:rows, 0:columns] / max(rows, columns)
    channels = [np.sin(9 * x + 4 * y) * 0.4 + 0.5, (np.hypot(x - 0.5, y - 0.4) < 0.3) * 0.7 + 0.2 * x, (x * 23 % 1) * y]
    texture = np.random.Generator(np.random.Philox(key=1)).normal(0, 0.04, (rows, columns, 3))
    rgb = np.clip(np.stack(channels, -1) + texture, 0, 1)
    return np.asarray(rgb * 255 + 0.5, np.uint8)


class _Paired:
    """Runs the engines of a component and its eager network on the same inputs, and returns the network's outputs."""

    def __init__(self, engines: Mapping[str, Engine], eager: Eager) -> None:
        self.engines, self.eager = engines, eager
        self.exact = copy.deepcopy(eager.network).double() if hasattr(eager.network, "winners") else None
        self.pairs: dict[str, dict[str, list[tuple[Floats, Floats]]]] = {name: {} for name in engines}
        self.choices = {name: dict.fromkeys(("total", "undecided", "differ", "wrong"), 0) for name in engines}

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        theirs = self.eager.run(inputs, self.eager.names)
        exact = self._exact(inputs)
        for engine, its_engine in self.engines.items():
            ours = its_engine.run(inputs, self.eager.names)
            same = self._compare_choices(engine, exact, ours, theirs)
            for name, array in ours.items():
                if array.dtype.kind == "f":
                    compared = np.broadcast_to(same, array.shape) if same is not None else np.ones(array.shape, bool)
                    self.pairs[engine].setdefault(name, []).append((array[compared], theirs[name][compared]))
        return {name: theirs[name] for name in outputs}

    def _exact(self, inputs: Mapping[str, Any]) -> tuple[Any, Any] | None:
        """The choices in float64, and where they are decided; none for a component without choices."""
        if self.exact is None:
            return None
        image = torch.from_numpy(*inputs.values())
        with torch.no_grad():
            scores, exact = self.eager.network.winners(image)[0], self.exact.winners(image.double())
        rounding = float((scores.double() - exact[0]).abs().max())
        if not math.isfinite(rounding):  # no choice would be decided, and any engine would pass
            raise AccuracyError("the scores of the choices are not finite in eager PyTorch; check the weights")
        return exact[1].numpy(), (exact[0][..., 0] - exact[0][..., 1] > UNDECIDED * rounding).numpy()

    def _compare_choices(
        self, engine: str, exact: tuple[Any, Any] | None, ours: dict[str, Any], theirs: dict[str, Any]
    ) -> npt.NDArray[np.bool_] | None:
        """Where all choices at a position agree [B, 1, rows, columns]; none for a component without choices."""
        if exact is None:
            return None
        (chosen, decided), counts = exact, self.choices[engine]
        name = next(n for n, array in ours.items() if array.dtype.kind == "i")
        counts["total"] += decided.size
        counts["undecided"] += int((~decided).sum())
        counts["differ"] += int((ours[name] != theirs[name]).sum())
        counts["wrong"] += int(((ours[name] != chosen) & decided).sum())
        return np.asarray((ours[name] == theirs[name]).all(1, keepdims=True))

    def report(self, engine: str) -> dict[str, Any]:
        """The differences of an engine over all calls."""
        pairs = self.pairs[engine].items()
        both = {name: [np.concatenate(side) for side in zip(*calls, strict=True)] for name, calls in pairs}
        report: dict[str, Any] = {"outputs": {name: _difference(*sides) for name, sides in both.items()}}
        return report | ({"choices": self.choices[engine]} if self.exact is not None else {})

    def close(self) -> None:
        """Nothing to free: the engines belong to the restorers."""


def _difference(ours: Floats, reference: Floats) -> dict[str, float]:
    if not reference.size:  # every choice differed, so nothing could be compared, and the engine must not pass
        return {"max_abs": 0.0, "relative_l2": 1.0, "psnr_db": 0.0}
    error = ours.astype(np.float64) - reference
    norm, peak = float(np.linalg.norm(reference.astype(np.float64))), float(np.ptp(reference))
    mean_square = float(np.mean(error**2))
    return {
        "max_abs": float(np.abs(error).max()),
        "relative_l2": float(np.linalg.norm(error)) / max(norm, 1e-30),
        "psnr_db": min(200.0, 10 * float(np.log10(max(peak, 1e-15) ** 2 / max(mean_square, 1e-60)))),
    }
