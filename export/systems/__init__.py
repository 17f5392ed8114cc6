"""The published systems, one file or folder each. PyTorch and NumPy are loaded only when something is computed."""

import importlib
from importlib.metadata import entry_points

from tilewright.export.system import System
from tilewright.runtime.errors import UsageError

__all__ = ["ENTRY_POINTS", "SYSTEMS", "names", "system"]

SYSTEMS = {  # name -> the module that holds its SYSTEM
    "in-token": "tilewright.export.systems.flux.in_token",
    "hitoksr": "tilewright.export.systems.hitoksr.system",
    "vicr": "tilewright.export.systems.flux.vicr",
    "instantir": "tilewright.export.systems.instantir.system",
    "toksr": "tilewright.export.systems.toksr.system",
}
ENTRY_POINTS = "tilewright.systems"  # other packages add systems under this group: NAME = MODULE


def names() -> list[str]:
    """The names of the published systems, and of the systems of other packages."""
    return list(dict.fromkeys([*SYSTEMS, *_of_packages()]))


def system(name: str) -> System:
    """The system of this name."""
    module = SYSTEMS.get(name) or _of_packages().get(name)
    if module is None:
        raise UsageError(f"system {name!r} is not one of {', '.join(names())}")
    named: System = importlib.import_module(module).SYSTEM
    return named


def _of_packages() -> dict[str, str]:
    return {entry.name: entry.module for entry in entry_points(group=ENTRY_POINTS)}
