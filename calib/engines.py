"""Adding engines in 8 bits to a bundle, each in the form that its backend computes fastest here.

The graphs of all backends have the same layers in 8 bits, and read the same weights. They differ in the form alone.
TensorRT's graphs are compiled to plans, on the machine with the GPU.
The bundle's other files stay as they are, and the new bundle replaces the old one in one step.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilewright.calib.insertion import Codes, insert, quantised_weights, table
from tilewright.calib.judge.trial import Trial
from tilewright.calib.networks import check_networks
from tilewright.calib.recipe import IN_BUNDLE, Recipe
from tilewright.calib.recipe.layers import StandardGraph
from tilewright.calib.recipe.make import graphs_of
from tilewright.export.build.cache import staging, write
from tilewright.export.build.compile import check_room_for, link, list_in_card, with_engines
from tilewright.export.plans.build import Options
from tilewright.export.targets import check_makeable, engine_folder, target_module
from tilewright.export.targets.tensorrt import typed
from tilewright.export.verify.sample import sample_photo
from tilewright.runtime.bundle.digests import sha256_of_file
from tilewright.runtime.bundle.manifest import EngineSpec, File, Form, Needs
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.strict import to_json
from tilewright.runtime.bundle.weights import Folder, Weights, location
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.engines import Engine, backend
from tilewright.runtime.engines.machine import this_machine
from tilewright.runtime.errors import EnvironmentMismatch, UsageError

__all__ = ["Added", "add_engines"]

ROUNDS = 5  # of timing; the forms take turns
LOST_DB = 1.0  # a form whose picture is so much worse than the most exact one is not taken
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Added:
    """The result of adding engines."""

    engines: tuple[str, ...]
    forms: dict[str, str]  # component and engine -> its form
    digest_before: str
    digest: str
    bytes: dict[str, int]  # component -> of the weights that its engine in 8 bits reads


def add_engines(
    root: Path,
    recipe: Recipe,
    targets: Sequence[str] = ("ort", "openvino"),
    *,
    threads: int = 0,
    expect: str | None = None,
    weights_dir: Path | None = None,
    plans: Options | None = None,
    on_progress: Report = lambda part, done, total: None,
) -> Added:
    """Add an engine of each target for every component that has layers in 8 bits. `plans`: how those are made."""
    precision, bundle = recipe.format, read_bundle(root, expect=expect)
    check_networks(bundle, recipe.networks, "the recipe")
    makers = {target: target_module(target).FORMS.get(precision, ()) for target in targets}
    if not any(makers.values()):
        raise UsageError(f"precision={precision!r} is none that {' or '.join(targets)} makes; add another target")
    check_makeable([target for target, forms in makers.items() if forms])
    if makers.get("tensorrt"):
        check_room_for(bundle, "tensorrt", [precision])
    graphs = graphs_of(bundle, weights_dir)
    names = sorted({name.partition("/")[0] for name in recipe.quantised})
    with staging(root.resolve()) as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True, copy_function=link)
        shutil.rmtree(folder / "weights" / precision, ignore_errors=True)
        codes = quantised_weights(graphs, recipe, folder / "weights" / precision, precision)
        chosen = _forms(bundle, graphs, recipe, codes, makers, folder, threads, weights_dir, on_progress)
        tables, components, forms = dict(bundle.weights.tensors), dict(bundle.manifest.components), {}
        for name in names:
            for target, form in chosen[name].items():
                model, own = insert(graphs[name], recipe, codes, form), f"{name}.{target}-{precision}"
                tables[own] = table(codes, model, bundle.weights.tensors.get(name, {}))
                if target == "tensorrt":
                    files = bundle.files_of(name, weights_dir) | {location(c.reference): c.path for c in codes.values()}
                    spec = _plan(bundle, name, precision, model, files, form, plans or Options(), folder)
                else:
                    file = f"{engine_folder(name, target)}/{precision}.onnx"
                    (folder / file).unlink(missing_ok=True)
                    (folder / file).parent.mkdir(parents=True, exist_ok=True)
                    ir.save(model, folder / file)
                    spec = _spec(bundle, name, target, precision, form, file)
                spec = replace(spec, weights=own, form=form)
                components[name] = with_engines(components[name], [spec])
                forms[f"{name}, {spec.name}"] = form.text
        stored = folder / "weights" / precision / f"{precision}.safetensors"
        folders = dict(bundle.weights.folders)
        folders[precision] = Folder(None, {stored.name: File(stored.stat().st_size, sha256_of_file(stored))})
        write(folder / "weights.json", to_json(Weights(folders, tables)))
        (folder / "reports").mkdir(exist_ok=True)
        recipe.write(folder / IN_BUNDLE.format(precision))
        list_in_card(folder / "README.md", components.values())
        (folder / "bundle.json").unlink()  # a link to the one that stays in use until the end
        seal(folder, replace(bundle.manifest, components=components), root)
    sizes = {name: sum(r.length for r in t.values()) for name, t in tables.items() if name not in components}
    engines = tuple(dict.fromkeys(name.partition(", ")[2] for name in forms))
    return Added(engines, forms, bundle.digest, read_bundle(root).digest, sizes)


def _plan(
    bundle: Bundle,
    component: str,
    precision: str,
    model: Any,
    files: Mapping[str, Path],
    form: Form,
    options: Options,
    folder: Path,
) -> EngineSpec:
    """Compile a graph in 8 bits."""
    from tilewright.export.build.plan import compile_graph, this_card

    typed(model, form.rest)
    return compile_graph(bundle, component, precision, model, files, this_card(), options, folder)


def _spec(bundle: Bundle, component: str, target: str, precision: str, form: Form, graph: str) -> EngineSpec:
    first = bundle.manifest.components[component].engines[0]
    references = bundle.weights.tensors.get(component, {}).values()
    parameters = sum(r.length for r in references) // 2
    spec: EngineSpec = target_module(target).spec(precision, graph, first.memory, parameters)
    return replace(spec, needs=_needs(spec.needs, target, form))


def _needs(needs: Needs, target: str, form: Form) -> Needs:
    """The needs of an engine, with those of the precision of its rest."""
    if form.rest == "float32":
        return needs
    module = target_module(target)
    return replace(needs, instructions=module.INSTRUCTIONS[form.rest], cores=module.CORES[form.rest])


def _forms(
    bundle: Bundle,
    graphs: Mapping[str, StandardGraph],
    recipe: Recipe,
    codes: Mapping[str, Codes],
    makers: Mapping[str, Sequence[Form]],
    folder: Path,
    threads: int,
    weights_dir: Path | None,
    on_progress: Report,
) -> dict[str, dict[str, Form]]:
    """The form for each component and target."""
    names = sorted({name.partition("/")[0] for name in recipe.quantised})
    able = {
        target: of_target
        for target, forms in makers.items()
        if (of_target := [f for f in forms if target_module(target).COMPILED or _runs(target, f)])
    }
    chosen: dict[str, dict[str, Form]] = {name: {target: forms[0] for target, forms in able.items()} for name in names}
    several = {target: forms for target, forms in able.items() if len(forms) > 1}
    if not several:
        return chosen
    with Trial(bundle, [_picture(bundle)], threads=threads, weights_dir=weights_dir) as trial:
        recorded = trial.calls()
        for place, name in enumerate(names):
            on_progress("choosing forms", place, len(names))
            for target, forms in several.items():
                opened = {form: _open(target, recipe, graphs[name], codes, form, trial) for form in forms}
                try:
                    chosen[name][target] = _fastest(name, opened, recorded[name].first, trial)
                finally:
                    for engine in opened.values():
                        engine.close()
        on_progress("choosing forms", len(names), len(names))
    return chosen


def _picture(bundle: Bundle) -> Any:
    """A picture of one tile."""
    program = bundle.program
    side = max((p.tiles.px for p in program.passes if p.tiles), default=program.multiple_px)
    return sample_photo(side, side, program.scale)


def _runs(target: str, form: Form) -> bool:
    """Whether a form runs on this machine."""
    try:
        backend(target)
    except EnvironmentMismatch:
        return False
    machine, needs = this_machine(set()), _needs(Needs(), target, form)
    return set(needs.instructions) <= set(machine.instructions) and needs.cores <= machine.cores


def _open(
    target: str,
    recipe: Recipe,
    graph: StandardGraph,
    codes: Mapping[str, Codes],
    form: Form,
    trial: Trial,
) -> Engine:
    path = Path(trial.folder.name) / f"{target}.onnx"
    ir.save(insert(graph, recipe, codes, form), path)
    precision = recipe.format if target == "ort" else form.rest
    files = trial.files(graph.component, codes.values())
    engine: Engine = backend(target).open_graph(path, files, precision=precision, threads=trial.threads)
    return engine


def _fastest(
    name: str, opened: Mapping[Form, Engine], calls: Sequence[tuple[Mapping[str, Any], list[str]]], trial: Trial
) -> Form:
    """The fastest form of those that are about as exact as the most exact one."""
    likeness = {form: trial.score({name: engine}).mean for form, engine in opened.items()}
    seconds: dict[Form, list[float]] = {form: [] for form in opened}
    for _ in range(ROUNDS):
        for form, engine in opened.items():
            start = time.perf_counter()
            for inputs, outputs in calls:
                engine.run(inputs, outputs)
            seconds[form].append(time.perf_counter() - start)
    exact = [form for form in opened if likeness[form] >= max(likeness.values()) - LOST_DB]
    return min(exact, key=lambda form: statistics.median(seconds[form]))
