"""Deciding a network's sizes from its configuration file, the shapes of its weights, options and the preset."""

import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.export.system import Preset, Tensors
from tilewright.export.weights.config import Config
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError, UsageError

__all__ = ["FileSizes", "Shapes", "blocks", "config_beside", "file_of", "folder_of", "network_sizes", "shapes_of"]

log = logging.getLogger("tilewright")
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class FileSizes:
    """Some sizes, and the file that tells them."""

    source: str
    sizes: Mapping[str, Any]


def config_beside(config: Config, place: Path) -> FileSizes | None:
    """The sizes in the configuration file beside a file of weights, or in a folder of weights."""
    folder = folder_of(place)
    sizes = config.read(folder)
    return None if sizes is None else FileSizes(f"config {folder / config.file}", sizes)


def folder_of(place: Path) -> Path:
    """A folder itself, or the folder of a file."""
    return place if place.is_dir() else place.parent


def network_sizes(
    network: str,
    preset: Preset,
    usual: Mapping[str, Any],
    config: FileSizes | None,
    weights: FileSizes | None,
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> dict[str, Any]:
    """Every size. Sources must agree. A size that no source tells has its usual value, with a warning.

    `options`: size -> its flag, and the user's value or none.
    """
    options = options or {}
    sizes, missing = dict(usual), []
    files = [file_sizes for file_sizes in (config, weights) if file_sizes]
    for name in dict.fromkeys([*usual, *(name for file_sizes in files for name in file_sizes.sizes)]):
        file_values = [
            FileSizes(file_sizes.source, {name: file_sizes.sizes[name]})
            for file_sizes in files
            if name in file_sizes.sizes
        ]
        flag, choice = options.get(name, ("", None))
        if file_values:
            sizes[name] = _agreed(name, file_values, preset, usual, flag, choice)
        elif choice is not None:
            sizes[name] = choice
        else:
            missing.append(name)
    if missing and weights and not preset.explicit:
        values = ", ".join(f"{name} {_shown(sizes[name])}" for name in missing)
        flags = [options[name][0] for name in missing if name in options]
        other = " or ".join(filter(None, [", ".join(flags), "its config.json" * (len(flags) < len(missing))]))
        source = weights.source
        log.warning(
            "%s: %s alone does not tell all sizes; using %s; give %s if they differ", network, source, values, other
        )
    return sizes


def _agreed(
    name: str, file_values: list[FileSizes], preset: Preset, usual: Mapping[str, Any], flag: str, choice: Any
) -> Any:
    """The value of a size in one or two files, which an option or a preset of the user may not contradict."""
    source, value = file_values[0].source, file_values[0].sizes[name]
    for other in file_values[1:]:
        if _differ(value, other.sizes[name]):
            raise _refusal(
                f"{source}: {name!r} is {_shown(value)}, in {other.source} it is {_shown(other.sizes[name])};"
                " give files that belong together"
            )
    if choice is not None and _differ(value, choice):
        raise UsageError(one_line(f"{flag} {_shown(choice)}: {source} says {_shown(value)}; leave {flag} out"))
    if preset.explicit and name in usual and _differ(value, usual[name]):
        has = f"preset {preset.name!r} has {name} {_shown(usual[name])}"
        raise UsageError(one_line(f"{has}, {source} says {_shown(value)}; leave --preset out"))
    return value


def shapes_of(
    what: str, tensors: Tensors, axes: Mapping[str, int], advice: str, spelled: Callable[[str], str] = str
) -> Shapes:
    """The shape of every tensor, under our names. The tensors in `axes` must exist and have so many axes."""
    shapes = {spelled(key): reference.shape for key, reference in tensors.tensors.items()}
    for key, count in axes.items():
        if len(shapes.get(key, ())) == count:
            continue
        some = ", ".join(sorted(tensors.tensors)[:3])
        fault = f"{key!r} has shape {list(shapes[key])}" if key in shapes else f"lacks {key!r} and holds {some}, ..."
        raise _refusal(f"{what} {file_of(tensors)}: {fault}; {advice}")
    return shapes


def blocks(names: Iterable[str], before: str) -> int:
    """The number of different blocks behind a prefix."""
    return len({name.removeprefix(before).split(".")[0] for name in names if name.startswith(before)})


def file_of(tensors: Tensors) -> str:
    """The first of the files, by its path as the user wrote it."""
    return min(tensors.sources.values())


def _differ(one: Any, other: Any) -> bool:
    """Whether two values differ in JSON, where tuples are lists."""
    return bool(json.loads(json.dumps(one)) != json.loads(json.dumps(other)))


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else repr(value)


def _refusal(text: str) -> InputError:
    return InputError(one_line(text))
