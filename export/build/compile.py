"""Adding engines to an existing bundle. Its files stay as they are; the new bundle replaces the old one in one step."""

import os
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from tilewright.export.build.assembly import engines
from tilewright.export.build.cache import staging
from tilewright.export.targets import engine_folder, engines_of, target_module
from tilewright.runtime.bundle.manifest import Component, EngineSpec, Memory
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import UsageError

__all__ = ["Compiled", "compile_engines", "link", "list_in_card", "with_engines"]


@dataclass(frozen=True)
class Compiled:
    """The result of adding engines."""

    engines: tuple[str, ...]  # the names of the engines that were made
    digest_before: str
    digest: str


def compile_engines(
    root: Path, targets: Sequence[str], precisions: Sequence[str], *, expect: str | None = None
) -> Compiled:
    """Make the engines of these targets for every component of a bundle. Engines of the same names are replaced."""
    pairs = engines_of(targets, precisions)
    for target in targets:
        if not target_module(target).FROM_BUNDLE:
            raise UsageError(f"target={target!r} needs the traced graph; use tilewright export build --target {target}")
    bundle = read_bundle(root, expect=expect)
    with staging(root.resolve()) as folder:
        shutil.copytree(root, folder, dirs_exist_ok=True, copy_function=link)
        components = {}
        for name, component in bundle.manifest.components.items():
            for target in targets:
                _prepare(bundle, name, target, folder)
            added = engines(folder, name, pairs, bundle.weights, partial(_memory, component))
            components[name] = with_engines(component, added)
        names = tuple(dict.fromkeys(f"{target}-{precision}" for target, precision in pairs))
        list_in_card(folder / "README.md", components.values())
        (folder / "bundle.json").unlink()  # a link to the one that stays in use until the end
        seal(folder, replace(bundle.manifest, components=components), root)
    return Compiled(names, bundle.digest, read_bundle(root).digest)


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
