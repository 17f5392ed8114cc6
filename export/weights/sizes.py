"""A network's sizes: its configuration file says them, the shapes of its weights show them, options name the rest."""

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
    """Sizes, and who says them."""

    source: str
    sizes: Mapping[str, Any]


def config_beside(config: Config, place: Path) -> FileSizes | None:
    """The configuration file in the folder of weights, or in the folder of a file of weights."""
    folder = folder_of(place)
    sizes = config.read(folder)
    return None if sizes is None else FileSizes(f"config {folder / config.file}", sizes)


def folder_of(place: Path) -> Path:
    """The folder itself, or that of a file."""
    return place if place.is_dir() else place.parent


def network_sizes(
    network: str,
    preset: Preset,
    usual: Mapping[str, Any],
    config: FileSizes | None,
    weights: FileSizes | None,
    options: Mapping[str, tuple[str, Any]] | None = None,
) -> dict[str, Any]:
    """Every size. Sources must agree; a size that none of them tells is the usual one, and is named.

    `options` has the flag of a size, and the user's value or none.
    """
    options = options or {}
    sizes, untold = dict(usual), []
    files = [said for said in (config, weights) if said]
    for name in dict.fromkeys([*usual, *(name for said in files for name in said.sizes)]):
        told = [FileSizes(said.source, {name: said.sizes[name]}) for said in files if name in said.sizes]
        flag, asked = options.get(name, ("", None))
        if told:
            sizes[name] = _agreed(name, told, preset, usual, flag, asked)
        elif asked is not None:
            sizes[name] = asked
        else:
            untold.append(name)
    if untold and weights and not preset.explicit:
        taken = ", ".join(f"{name} {_shown(sizes[name])}" for name in untold)
        flags = [options[name][0] for name in untold if name in options]
        other = " or ".join(filter(None, [", ".join(flags), "its config.json" * (len(flags) < len(untold))]))
        source = weights.source
        log.warning(
            "%s: %s alone does not tell all sizes; using %s; give %s if they differ", network, source, taken, other
        )
    return sizes


def _agreed(name: str, told: list[FileSizes], preset: Preset, usual: Mapping[str, Any], flag: str, asked: Any) -> Any:
    """What one or two files say of a size, which neither an option nor a preset may contradict."""
    source, value = told[0].source, told[0].sizes[name]
    for other in told[1:]:
        if _differ(value, other.sizes[name]):
            raise _refusal(
                f"{source}: {name!r} is {_shown(value)}, in {other.source} it is {_shown(other.sizes[name])};"
                " give files that belong together"
            )
    if asked is not None and _differ(value, asked):
        raise UsageError(one_line(f"{flag} {_shown(asked)}: {source} says {_shown(value)}; leave {flag} out"))
    if preset.explicit and name in usual and _differ(value, usual[name]):
        has = f"preset {preset.name!r} has {name} {_shown(usual[name])}"
        raise UsageError(one_line(f"{has}, {source} says {_shown(value)}; leave --preset out"))
    return value


def shapes_of(
    what: str, tensors: Tensors, axes: Mapping[str, int], advice: str, spelled: Callable[[str], str] = str
) -> Shapes:
    """The shape of every tensor by its spelling here; those that tell sizes must be there, of so many axes."""
    shapes = {spelled(key): reference.shape for key, reference in tensors.tensors.items()}
    for key, count in axes.items():
        if len(shapes.get(key, ())) == count:
            continue
        some = ", ".join(sorted(tensors.tensors)[:3])
        fault = f"{key!r} has shape {list(shapes[key])}" if key in shapes else f"lacks {key!r} and holds {some}, ..."
        raise _refusal(f"{what} {file_of(tensors)}: {fault}; {advice}")
    return shapes


def blocks(names: Iterable[str], before: str) -> int:
    """How many numbered blocks follow a prefix."""
    return len({name.removeprefix(before).split(".")[0] for name in names if name.startswith(before)})


def file_of(tensors: Tensors) -> str:
    """The first of the files, as the user knows it."""
    return min(tensors.sources.values())


def _differ(left: Any, right: Any) -> bool:
    """Whether two values differ as JSON knows them: a list is a tuple."""
    return bool(json.loads(json.dumps(left)) != json.loads(json.dumps(right)))


def _shown(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, str) else repr(value)


def _refusal(text: str) -> InputError:
    return InputError(one_line(text))
