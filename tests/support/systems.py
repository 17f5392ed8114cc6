"""A system as a build of one of its presets, or of the user's files, has it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from support.quick import few_quick
from tilewright.export.build.stages.trace import traced
from tilewright.export.system import ComponentSpec, Preset, Settings, System, UserFiles
from tilewright.export.systems import names, system
from tilewright.export.weights.files import converted, find

# as parameters of tests that build a bundle of each
EVERY_SYSTEM = few_quick(names(), "hitoksr")


def settings_of(name: str, preset: str = "tiny", **options: Any) -> Settings:
    """The settings of a build without files."""
    s = system(name)
    return s.decide(Preset(preset, s.presets[preset], explicit=True), options, UserFiles({}, {}))


def components_of(name: str, preset: str = "tiny", **options: Any) -> dict[str, ComponentSpec]:
    """The components of a build without files."""
    return system(name).components(settings_of(name, preset, **options))


def graph_of(source: ComponentSpec) -> ir.Model:
    """A component's graph, which is traced once in a run of tests."""
    return ir.load(traced("a component", source))


def user_files(places: Mapping[str, Path]) -> UserFiles:
    """The files of each origin, pickles converted."""
    return UserFiles({name: converted(find(place)) for name, place in places.items()}, places)


def decided(system: System, files: UserFiles, preset: str | None = None, **options: Any) -> Settings:
    """The settings of a build of these files, without --preset or with it."""
    name = preset or next(iter(system.presets))
    return system.decide(Preset(name, system.presets[name], preset is not None), options, files)
