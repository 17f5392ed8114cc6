"""Write docs/api.md from the docstrings of tilewright.runtime. A test compares the two.

python tools/api_page.py
"""

import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

__all__ = ["page"]

ROOT = Path(__file__).parent.parent
PARTS = (  # module -> its names, in the order of the page
    ("tilewright.runtime", ("load", "Restorer", "Sitting", "Ticket", "Restoration", "write_image", "encode_image")),
    ("tilewright.runtime.native", ("load_native", "NativeRestorer")),
    ("tilewright.runtime.folder", ("images_of", "restore_images", "Outcome")),
    ("tilewright.runtime.bundle.arguments", ("Argument",)),
    ("tilewright.runtime.memory.estimate", ("Estimate",)),
    ("tilewright.runtime.plan.forecast", ("Forecast",)),
    ("tilewright.runtime.errors", ()),
)
HOMES = {"Sitting": "tilewright.runtime.sitting", "Ticket": "tilewright.runtime.sitting"}
SHOWN = {  # class -> its members that callers use; of other classes, all with a docstring
    "Restorer": ("arguments", "ran", "__call__", "restore", "submit", "sitting", "estimate", "close"),
    "NativeRestorer": ("arguments", "ran", "__call__", "restore", "close"),
    "Sitting": ("shape", "__call__", "restore", "begin"),
    "Ticket": ("result", "done", "cancel", "forecast", "share", "keep", "keeping"),
}
MADE = ("Restorer", "NativeRestorer", "Sitting", "Ticket")  # other functions make them
HEAD = """# The Python API

This page is made from the docstrings of `tilewright.runtime`, by `python tools/api_page.py`. [Embedding in
Python](python.md) explains how its parts work together.

"""


def page() -> str:
    """The text of the page."""
    text = HEAD
    for module, names in PARTS:
        home = importlib.import_module(module)
        text += f"## {module}\n\n{_plain(home)}\n\n"
        for name in names or [n for n in home.__all__ if n != "amount"]:
            text += _entry(name, getattr(importlib.import_module(HOMES.get(name, module)), name))
    return text.rstrip() + "\n"


def _entry(name: str, thing: Any) -> str:
    if not inspect.isclass(thing):
        return f"### {name}\n\n{_code(name, thing)}{_plain(thing)}\n\n"
    if issubclass(thing, Exception):
        return f"### {name}\n\n{_plain(thing)} Exit code {thing.exit_code}.\n\n"
    text = f"### {name}\n\n{_plain(thing)}\n\n"
    if dataclasses.is_dataclass(thing) and name not in MADE:
        lines = (f"{f.name}: {_type(f.type)}\n" for f in dataclasses.fields(thing) if not f.name.startswith("_"))
        text += f"```py\n{''.join(lines)}```\n\n"
    fields = {f.name for f in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for member in SHOWN.get(name, [n for n in vars(thing) if not n.startswith("_") and n not in fields]):
        value = inspect.getattr_static(thing, member)
        if isinstance(value, property):
            text += f"#### {name}.{member}\n\n```py\n{member}: {_type(value.fget.__annotations__['return'])}\n```\n\n"
            text += f"{_plain(value)}\n\n"
        elif inspect.isfunction(value):
            shown = "restorer" if name.endswith("Restorer") else name.lower()
            called = shown if member == "__call__" else f"{shown}.{member}"
            text += f"#### {called}()\n\n{_code(called, value)}{_plain(value)}\n\n"
    return text


def _code(name: str, function: Any) -> str:
    """The signature, one parameter a line if it is long."""
    signature = inspect.signature(function)
    kept = [p for p in signature.parameters.values() if p.name != "self"]
    parts, starred = [], False
    for p in kept:
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
            starred = True
        starred |= p.kind is p.VAR_POSITIONAL
        before = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "")
        default = "" if p.default is p.empty else f" = {_default(p.default)}"
        parts.append(f"{before}{p.name}: {_type(p.annotation)}{default}")
    end = f" -> {_type(signature.return_annotation)}"
    line = f"{name}({', '.join(parts)}){end}"
    if len(line) > 100:
        line = f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){end}"
    return f"```py\n{line}\n```\n\n"


def _default(value: Any) -> str:
    return "..." if inspect.isfunction(value) else repr(value)


def _type(annotation: Any) -> str:
    text = annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)
    text = text.replace("'", "").replace('"', "")
    text = re.sub(r"\b(?:[a-z_0-9]+\.)+(?=[A-Za-z])", "", text)
    return text.replace("ndarray[tuple[Any, ...], dtype[uint8]]", "NDArray[uint8]")


def _plain(thing: Any) -> str:
    """A docstring as paragraphs."""
    text = inspect.getdoc(thing) or ""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


if __name__ == "__main__":
    (ROOT / "docs" / "api.md").write_text(page())
