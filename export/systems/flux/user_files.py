"""Reading a network's sizes from the user's files, and refusing two networks that do not fit together."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tilewright.export.system import Preset, Tensors, UserFiles
from tilewright.export.systems.flux.keys import keys
from tilewright.export.weights.config import Config
from tilewright.export.weights.files import resolve
from tilewright.export.weights.sizes import FileSizes, config_beside, file_of, folder_of, network_sizes
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = [
    "Shapes",
    "check_joint",
    "config_sizes",
    "folder_of_model",
    "sizes_of",
    "source_of",
    "warn_of_usual",
    "without_none",
]

log = logging.getLogger("tilewright")


@dataclass(frozen=True)
class Shapes:
    """The shapes of a component's parameters, asked for by our names, whatever names the files use."""

    component: str
    tensors: Tensors

    def shape(self, parameter: str) -> tuple[int, ...]:
        """The shape of a parameter; empty where the files lack it."""
        reference = resolve(self.tensors, keys(self.component, parameter))
        return reference.shape if reference else ()

    def side(self, parameter: str, axis: int, axes: int = 2) -> int | None:
        """The length of one axis; none where the tensor has another number of axes."""
        shape = self.shape(parameter)
        return shape[axis] if len(shape) == axes else None

    def blocks(self, pattern: str) -> int:
        """How many blocks there are whose tensors match the pattern."""
        count = 0
        while self.shape(pattern.format(count)):
            count += 1
        return count


def sizes_of(
    config: Config,
    origin: str,
    preset: Preset,
    files: UserFiles,
    usual: Mapping[str, Any],
    shape_sizes: Mapping[str, Any],
) -> dict[str, Any]:
    """A network's sizes from its configuration file and its tensors' shapes, which must agree."""
    if origin not in files.tensors:
        return dict(usual)
    weights = FileSizes(f"weights {file_of(files.tensors[origin])}", without_none(shape_sizes))
    file_sizes = config_sizes(config, origin, files)
    sizes = network_sizes(origin, preset, usual, file_sizes, weights)
    if file_sizes is None and (complaint := config.fits(sizes)):
        raise InputError(one_line(f"{weights.source}: {complaint}; put its {config.file} beside it"))
    return sizes


def config_sizes(config: Config, origin: str, files: UserFiles) -> FileSizes | None:
    """The sizes in the configuration file beside an origin's weights."""
    return config_beside(config, files.places[origin]) if origin in files.places else None


def without_none(shape_sizes: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes without those that are none."""
    return {name: value for name, value in shape_sizes.items() if value is not None}


def source_of(origin: str, preset: Preset, files: UserFiles) -> str:
    """For messages: where an origin's sizes come from."""
    return f"{origin} {files.places[origin]}" if origin in files.places else f"{origin} of preset {preset.name!r}"


def check_joint(one: str, width: int, other: str, needed: int) -> None:
    """Refuse two networks if one gives a width that the other does not take."""
    if width != needed:
        preset = ", or the --preset of their size" if " of preset " in f"{one}{other}" else ""
        raise InputError(one_line(f"{one} {width}, {other} {needed}; give files of one model{preset}"))


def folder_of_model(files: UserFiles) -> Path | None:
    """The folder of the whole model: the transformer, the schedule, the tokenizers and the encoders lie in it."""
    if "transformer" not in files.places:
        return None
    folder = folder_of(files.places["transformer"])
    return folder.parent if folder.name == "transformer" else folder


def warn_of_usual(what: str, file: Path, preset: Preset, usual: Mapping[str, Any]) -> None:
    """Warn that a file is missing, with the preset's values that replace it, unless the user named that preset."""
    if not preset.explicit:
        values = ", ".join(f"{name} {value}" for name, value in usual.items())
        log.warning(one_line(f"{what}: no {file}; using {values}; put the file there if its values differ"))
