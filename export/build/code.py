"""The source files that a result depends on: a module, the modules that it imports, and those that they import."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from tilewright.runtime.bundle.digests import sha256_of_file

__all__ = ["HOUSE", "code", "imports"]

HOUSE = Path(__file__).parents[2]  # the folder of export/, kernels/ and runtime/, installed or not
IMPORT = re.compile(r"^[ \t]*(?:from[ \t]+([\w.]+)[ \t]+import[ \t]+(\([^)]*\)|[^\n#]*)|import[ \t]+([^\n#]+))", re.M)


def code(*modules: str) -> dict[str, str]:
    """The digest of every source file of these modules, for the key of a stage."""
    files: dict[str, Path] = {}
    pending = list(modules)
    roots = {module.split(".")[0] for module in modules} | {"tilewright"}
    while pending:
        module = pending.pop()
        if module in files or module.split(".")[0] not in roots:
            continue
        if file := _file_of(module):
            files[module] = file
            pending += _read(file, file.stat().st_mtime_ns)[1]
    if missing := sorted(set(modules) - files.keys()):
        raise LookupError(f"{missing[0]} is no module with a source file")
    return {f"code {module}": _read(file, file.stat().st_mtime_ns)[0] for module, file in sorted(files.items())}


@functools.cache
def _read(file: Path, modified: int) -> tuple[str, tuple[str, ...]]:
    """The digest of a source file, and the names that it imports."""
    return sha256_of_file(file), tuple(imports(file.read_text(encoding="utf-8")))


def imports(text: str) -> Iterator[str]:
    """Every name that a source file may import, also inside functions; `from a import b` gives a and a.b."""
    for module, names, plain in IMPORT.findall(text):
        if module:
            yield module
        for name in re.sub(r"#[^\n]*|[()]", " ", names or plain).split(","):
            if words := name.split():  # `b as c` imports b
                yield f"{module}.{words[0]}" if module else words[0]


@functools.cache
def _file_of(module: str) -> Path | None:
    """The source file of a module. None for a name inside a module, and for a folder without `__init__.py`."""
    top, *rest = module.split(".")
    if top == "tilewright":
        place = HOUSE.joinpath(*rest)
        return next((f for f in (place.with_suffix(".py"), place / "__init__.py") if rest and f.is_file()), None)
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError, AttributeError):  # a name inside a module
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None
