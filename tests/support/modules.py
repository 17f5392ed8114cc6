"""Python files that are no part of a package, as modules."""

import importlib.util
from pathlib import Path
from types import ModuleType

__all__ = ["module_at"]


def module_at(file: Path) -> ModuleType:
    """The module in a file, run anew."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
