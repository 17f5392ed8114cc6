"""How the sizes of a network are found in the user's files, and refused where two networks do not fit together."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.export.system import Preset, Tensors, UserFiles
from tilewright.export.systems.flux.keys import keys
from tilewright.export.weights.config import Config
from tilewright.export.weights.files import resolve
from tilewright.export.weights.sizes import Said, config_beside, file_of, folder_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = [
    "Shapes",
    "check_joint",
    "folder_of_model",
    "said_of",
    "sizes_of",
    "source_of",
    "warn_of_usual",
    "without_none",
]

log = logging.getLogger("tilewright")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a component's parameters, by our names, in any spelling of files."""

    component: str
    tensors: Tensors

    def of(self, parameter: str) -> tuple[int, ...]:
        """Empty where the files have no such tensor."""
        reference = resolve(self.tensors, keys(self.component, parameter))
        return reference.shape if reference else ()

    def side(self, parameter: str, axis: int, axes: int = 2) -> int | None:
        """One side of a tensor of so many axes."""
        shape = self.of(parameter)
        return shape[axis] if len(shape) == axes else None

    def blocks(self, pattern: str) -> int:
        """How many blocks of that kind there are."""
        count = 0
        while self.of(pattern.format(count)):
            count += 1
        return count


def sizes_of(
    config: Config, origin: str, preset: Preset, files: UserFiles, usual: Mapping[str, Any], shown: Mapping[str, Any]
) -> dict[str, Any]:
    """A network's sizes, as its configuration file says them; `shown` are those that its shapes tell."""
    if origin not in files.tensors:
        return dict(usual)
    weights = Said(f"weights {file_of(files.tensors[origin])}", without_none(shown))
    said = said_of(config, origin, files)
    sizes = network_sizes(origin, preset, usual, said, weights)
    if said is None and (complaint := config.fits(sizes)):
        raise InputError(one_line(f"{weights.source}: {complaint}; put its {config.file} beside it"))
    return sizes


def said_of(config: Config, origin: str, files: UserFiles) -> Said | None:
    """What the configuration file beside an origin's weights says."""
    return config_beside(config, files.places[origin]) if origin in files.places else None


def without_none(shown: Mapping[str, Any]) -> dict[str, Any]:
    """Only the sizes that there are."""
    return {name: value for name, value in shown.items() if value is not None}


def source_of(origin: str, preset: Preset, files: UserFiles) -> str:
    """Where an origin's sizes are from, for people."""
    return f"{origin} {files.places[origin]}" if origin in files.places else f"{origin} of preset {preset.name!r}"


def check_joint(one: str, width: int, other: str, needed: int) -> None:
    """Refuse two networks, of which one gives what the other takes, with different widths."""
    if width != needed:
        preset = ", or the --preset of their size" if " of preset " in f"{one}{other}" else ""
        raise InputError(one_line(f"{one} {width}, {other} {needed}; give files of one model{preset}"))


def folder_of_model(files: UserFiles) -> Path | None:
    """Where the transformer's folder or file lies, and beside it the schedule, the tokenizers and the encoders."""
    if "transformer" not in files.places:
        return None
    folder = folder_of(files.places["transformer"])
    return folder.parent if folder.name == "transformer" else folder


def warn_of_usual(what: str, file: Path, preset: Preset, usual: Mapping[str, Any]) -> None:
    """Name what is taken in the place of a file, unless the user named the preset that has it."""
    if not preset.asked:
        values = ", ".join(f"{name} {value}" for name, value in usual.items())
        log.warning(one_line(f"{what}: no {file}; taken are {values}; put the file there if they are others"))
