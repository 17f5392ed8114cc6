"""The published systems, one file each; none of them loads PyTorch until a network is built.

A system's file has these names; `settings` are what `settings()` returns, plain values that fit JSON:

    TITLE, LICENCE                          for people: what it is, and the licence of its base weights
    PRESETS                                 preset -> the arguments of its networks' configuration
    OPTIONS                                 argument of `export build` -> Option, beyond those every system has
    ORIGINS                                 name -> Origin: the weights it reads, and where they are found
    settings(preset, given, origins)        what was asked for and what the files say, checked
    components(preset, **settings)          component -> ComponentSpec, those that become graphs
    build_time(preset, **settings)          component -> ComponentSpec, those that run once, at build
    program(preset, **settings)             the Program that drives them
    constants(preset, run, given, **settings)  tensors that the program reads; `run(component, **inputs)` runs one now
    tokenizers(preset, given, folder, **settings)  file in the bundle -> its text
    PARTS                                   other files of the system, as patterns; may be left out
    origins(component)                      where a component's weights may be found, all of them
    origin(component, parameter)            where a parameter's weights are found
    keys(component, parameter)              names under which weight files may hold it, best first
    ignored(origin, key)                    whether a weight file may hold this key without it being read
    stand_in(preset)                        file -> its tensors (name -> TensorSpec) or its text: all a user must have
"""

import importlib
from types import ModuleType

from tilewright.runtime.errors import UsageError

__all__ = ["SYSTEMS", "licence", "system"]

SYSTEMS = {
    "in-token": "tilewright.export.systems.flux.in_token",
    "hitoksr": "tilewright.export.systems.hitoksr",
    "vicr": "tilewright.export.systems.flux.vicr",
    "instantir": "tilewright.export.systems.instantir.system",
    "toksr": "tilewright.export.systems.toksr",
}


def licence(name: str, preset: str) -> str:
    """Of the weights that a preset is built from."""
    return "Apache-2.0: trained by tools/train" if preset == "demo" else str(system(name).LICENCE)


def system(name: str) -> ModuleType:
    """The file of a system."""
    if name not in SYSTEMS:
        raise UsageError(f"system {name!r} is not one of {', '.join(SYSTEMS)}")
    return importlib.import_module(SYSTEMS[name])
