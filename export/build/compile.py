"""Adding engines to an existing bundle. Its files stay as they are; the new bundle replaces the old one in one step."""

import math
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tilewright.export.build.assembly import engines
from tilewright.export.build.cache import staging
from tilewright.export.plans.build import Options
from tilewright.export.targets import check_makeable, engine_folder, engines_of, target_module
from tilewright.runtime.bundle.manifest import Component, EngineSpec, Memory
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import UsageError
from tilewright.runtime.memory.machine import available_bytes

__all__ = ["Compiled", "check_room_for", "compile_engines", "link", "list_in_card", "split", "with_engines"]


@dataclass(frozen=True)
class Compiled:
    """The result of adding engines."""

    engines: tuple[str, ...]  # the names of the engines that were made
    digest_before: str
    digest: str


Choice = tuple[tuple[str, ...], tuple[str, ...]]  # targets and precisions


def split(targets: Sequence[str], precisions: Sequence[str]) -> tuple[Choice, Choice]:
    """The targets and precisions that a build makes graphs of, and those that are compiled from its bundle.

    A bundle has an engine that runs anywhere, so ONNX Runtime's is added where none is asked for.
    """
    now, later = _parted(engines_of(targets, precisions))
    return _choice(now or [("ort", "float32")]), _choice(later)


def _parted(pairs: Iterable[tuple[str, str]]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The engines that are graphs, and those that are compiled."""
    kinds: dict[bool, list[tuple[str, str]]] = {False: [], True: []}
    for pair in pairs:
        kinds[target_module(pair[0]).COMPILED].append(pair)
    return kinds[False], kinds[True]


def _choice(pairs: Iterable[tuple[str, str]]) -> Choice:
    pairs = list(pairs)
    return tuple(dict.fromkeys(t for t, _ in pairs)), tuple(dict.fromkeys(p for _, p in pairs))


def compile_engines(
    root: Path,
    targets: Sequence[str],
    precisions: Sequence[str],
    *,
    expect: str | None = None,
    options: Options | None = None,
) -> Compiled:
    """Make the engines of these targets for every component of a bundle. Engines of the same names are replaced."""
    pairs = engines_of(targets, precisions)
    for target in targets:
        if not target_module(target).FROM_BUNDLE:
            raise UsageError(f"target={target!r} needs the traced graph; use tilewright export build --target {target}")
    check_makeable(targets)
    graphs, compiled = _parted(pairs)
    bundle = read_bundle(root, expect=expect)
    for target in dict(compiled):
        check_room_for(bundle, target, [p for t, p in compiled if t == target])
    with staging(root.resolve()) as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True, copy_function=link)
        components, names = {}, dict[str, None]()
        for name, component in bundle.manifest.components.items():
            for target in dict(graphs):
                _prepare(bundle, name, target, folder)
            added = engines(folder, name, graphs, bundle.weights, partial(_memory, component))
            added += _compiled(bundle, name, compiled, folder, options or Options())
            components[name] = with_engines(component, added)
            names |= dict.fromkeys(spec.name for spec in added)
        list_in_card(folder / "README.md", components.values())
        (folder / "bundle.json").unlink()  # a link to the one that stays in use until the end
        seal(folder, replace(bundle.manifest, components=components), root)
    return Compiled(tuple(names), bundle.digest, read_bundle(root).digest)


def check_room_for(bundle: Bundle, target: str, precisions: Sequence[str]) -> None:
    """Refuse engines that do not fit on this machine's GPU, or into its memory, before anything is compiled."""
    from tilewright.export.plans.forecast import check_gpu, check_host, package_forecast, plan_forecast

    sizes = {name: sum(math.prod(r.shape) for r in table.values()) for name, table in bundle.weights.tensors.items()}
    if target == "tensorrt":
        from tilewright.export.build.plan import this_card
        from tilewright.runtime.engines.driver import first_gpu

        predicted = plan_forecast(this_card().architecture, first_gpu().memory()[1], sizes, precisions)
        check_gpu(predicted)
    elif target == "aoti":
        predicted = package_forecast(None, None, sizes, precisions)
    else:  # graphs, which are written anywhere
        return
    check_host(predicted, available_bytes())


def _compiled(
    bundle: Bundle, component: str, pairs: Sequence[tuple[str, str]], folder: Path, options: Options
) -> tuple[EngineSpec, ...]:
    """The compiled engines of a component. Without weights, the most accurate precision of each target is enough."""
    if not bundle.weights.tensors.get(component):
        pairs = [*{target: (target, precision) for target, precision in reversed(pairs)}.values()][::-1]
    return tuple(_one(bundle, component, target, precision, folder, options) for target, precision in pairs)


def _one(bundle: Bundle, component: str, target: str, precision: str, folder: Path, options: Options) -> EngineSpec:
    if target == "tensorrt":
        from tilewright.export.build.plan import compile_plan, this_card

        return compile_plan(bundle, component, precision, this_card(), options, folder)

    if target == "aoti":
        from tilewright.export.build.package import compile_package

        return compile_package(bundle, component, precision, folder)
    return _graph(bundle, component, target, precision, folder)


def _graph(bundle: Bundle, name: str, target: str, precision: str, folder: Path) -> EngineSpec:
    """Write a graph with the types of a precision, if it differs from the portable graph; returns its engine."""
    import onnx_ir as ir

    module, component = target_module(target), bundle.manifest.components[name]
    place = component.graph
    model = ir.load(bundle.path(place))
    if module.prepare(model) or precision != "float32":
        module.typed(model, precision)
        place = f"{engine_folder(name, target)}/{precision}.onnx"
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).unlink(missing_ok=True)  # it may be another name of the old bundle's file
        ir.save(model, folder / place)
    return module.spec(precision, place, component.engines[0].memory, 0)


def _memory(component: Component, target: str) -> Memory:
    """The memory of the first engine: those of a component hold the same values."""
    return component.engines[0].memory


def link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the disk has no second names. Sealed files do not change."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _prepare(bundle: Bundle, component: str, target: str, folder: Path) -> None:
    """Write the graph of a target, if it differs from the portable graph."""
    import onnx_ir as ir

    model = ir.load(bundle.path(bundle.manifest.components[component].graph))
    file = folder / engine_folder(component, target) / "model.onnx"
    file.unlink(missing_ok=True)
    if target_module(target).prepare(model):
        file.parent.mkdir(parents=True, exist_ok=True)
        ir.save(model, file)


def with_engines(component: Component, added: Iterable[EngineSpec]) -> Component:
    """A component with these engines, in the place of those with their names."""
    named = {spec.name: spec for spec in (*component.engines, *added)}
    return replace(component, engines=tuple(named.values()))


def list_in_card(card: Path, components: Iterable[Component]) -> None:
    """Let the bundle's card name its engines."""
    if card.is_file():
        names = ", ".join(sorted({spec.name for component in components for spec in component.engines}))
        text = re.sub(r"^- engines: .*$", f"- engines: {names}", card.read_text("utf-8"), count=1, flags=re.MULTILINE)
        card.unlink()  # it may be another name of the old bundle's file
        card.write_text(text, "utf-8")
