"""A file with the finished parts of a restoration, from which the same restoration goes on later.

It is a safetensors file. Its last tensor is the SHA-256 of all bytes before. The names of the others are JSON lists:
`["done", block]`, `["pixels", top, left]`, and the keys of `Finished.values`.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.digests import sha256_of_file, writing
from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.bundle.safetensors import safetensors_header, safetensors_metadata, safetensors_start
from tilewright.runtime.errors import BundleError, InputError, UsageError
from tilewright.runtime.execute.finished import Finished, Key
from tilewright.runtime.execute.values import on_host
from tilewright.runtime.images.on_disk import Rectangle
from tilewright.runtime.images.read import Picture, Pixels

__all__ = [
    "DIGITS",
    "Checkpoint",
    "Outdated",
    "asked_in",
    "beside",
    "lies_on_disk",
    "pixels_beside",
    "plain",
    "read_checkpoint",
    "require_same",
    "share_in",
    "value_of_picture",
]

DIGITS = 24  # of a digest
BAND = 128  # rows of a picture that may lie on the disk
SHOWN = 60  # most characters of a value in a message
MALFORMED = (BundleError, KeyError, ValueError, TypeError, AttributeError, RecursionError)  # of a file of another kind


class Outdated(Exception):
    """The parts of a checkpoint have changed while it was written."""


@dataclass(frozen=True)
class Checkpoint:
    """The finished parts of a restoration, and all that decides its result."""

    asked: Mapping[str, Any]  # "seed=" -> 7, "image " -> "640x480 px, ...": an argument, or something else
    threads: int  # of a device
    share: float  # of the nodes that are done
    tile: int | None  # the side of tiles, which may have become smaller than was asked
    notes: tuple[str, ...]
    finished: Finished
    pixels: Mapping[tuple[int, int], Pixels]  # top, left -> part of the picture that is final
    sums: Mapping[Rectangle, int] = field(default_factory=dict)  # such a part that lies on the disk -> its CRC-32

    def write(self, path: Path, still_right: Callable[[], bool]) -> None:
        """Write the file, completely or not at all."""
        tensors: dict[Key, Any] = {("done", n): np.frombuffer(b, np.uint8) for n, b in enumerate(self.finished.done)}
        tensors |= {("pixels", *place): part for place, part in self.pixels.items()}
        tensors |= {key: np.asarray(on_host(value)) for key, value in self.finished.values.items()}
        specs = {json.dumps(key): (str(array.dtype), array.shape) for key, array in tensors.items()}
        start = safetensors_start(specs | {"sha256": ("uint8", (hashlib.sha256().digest_size,))}, self._metadata())
        digest = hashlib.sha256(start)
        with writing(path) as temporary, temporary.open("wb") as file:
            file.write(start)
            for array in tensors.values():
                data = _bytes_of(array)
                digest.update(data)
                file.write(data)
            file.write(digest.digest())
            if not still_right():
                raise Outdated

    def _metadata(self) -> dict[str, str]:
        finished = self.finished
        values = {
            "asked": dict(self.asked),
            "threads": self.threads,
            "share": self.share,
            "tile": self.tile,
            "notes": self.notes,
            "passes": sorted(finished.passes),
            "ended": sorted(finished.ended),
            "keep": finished.keep,
            "regions": tuple(finished.regions),
            "sums": [[*rectangle, total] for rectangle, total in self.sums.items()],
        }
        return {name: json.dumps(value) for name, value in values.items()}


def read_checkpoint(path: Path) -> Checkpoint | None:
    """The checkpoint in a file; none if there is no file. A damaged one is refused."""
    try:
        if not path.exists():
            return None
        _require_whole(path)
        values, arrays = _metadata_of(path), _arrays_in(path)
        done = [arrays.pop(("done", n)).tobytes() for n in range(sum(key[0] == "done" for key in arrays))]
        pixels = {(top, left): arrays[kind, top, left] for kind, top, left in [k for k in arrays if k[0] == "pixels"]}
        live = {key: array for key, array in arrays.items() if key[0] != "pixels"}
        passes, ended, keep, regions = (values[name] for name in ("passes", "ended", "keep", "regions"))
        finished = Finished(frozenset(passes), frozenset(ended), keep, done, regions, live)
        facts = {name: values[name] for name in ("asked", "threads", "share", "tile")}
        sums = {(top, left, bottom, right): total for top, left, bottom, right, total in values["sums"]}
        return Checkpoint(**facts, notes=tuple(values["notes"]), finished=finished, pixels=pixels, sums=sums)
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}); check the path") from error
    except MALFORMED:
        raise InputError(f"{path} is damaged or no file of finished parts; remove it to begin anew") from None


def beside(target: Path) -> Path:
    """The file for the finished parts of a result."""
    return target.with_name(f"{target.name}.resume")


def pixels_beside(target: Path) -> Path:
    """The file for the pixels of a result that does not fit in memory."""
    return target.with_name(f"{target.name}.pixels")


def lies_on_disk(path: Path) -> bool:
    """Whether the pixels of a checkpoint lie in a file of their own."""
    try:
        return bool(_metadata_of(path)["sums"])
    except (OSError, *MALFORMED):
        return False


def asked_in(path: Path) -> dict[str, Any] | None:
    """All that decides the result of a checkpoint, from its header; none if there is no readable one."""
    try:
        return dict(_metadata_of(path)["asked"])
    except (OSError, *MALFORMED):
        return None


def share_in(path: Path) -> float | None:
    """The share of the work that is done in a checkpoint, from its header; none if there is no readable one."""
    try:
        return float(_metadata_of(path)["share"])
    except (OSError, *MALFORMED):
        return None


def require_same(path: str | os.PathLike[str], before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on if anything that decides the result has changed."""
    changed = [name for name in dict.fromkeys((*before, *now)) if before.get(name) != now.get(name)]
    if changed:
        shown = {name: _shown(before.get(name), now.get(name)) for name in changed}
        then, today = (", ".join(name + shown[name][i] for name in changed) for i in (0, 1))
        raise UsageError(
            f"{path} is of a restoration with {then}, and this one has {today}; ask for the same as before, or remove"
            " the file to begin anew"
        )


def value_of_picture(picture: Picture) -> str:
    """A text that differs for pictures with other pixels."""
    height, width = picture.rgb.shape[:2]
    digest = hashlib.sha256(f"{width}x{height} {picture.grey} {picture.icc!r}".encode())
    for plane in (picture.rgb, picture.alpha):
        for top in range(0, height, BAND) if plane is not None else ():
            digest.update(_bytes_of(plane[top : top + BAND, 0:width]))
        digest.update(b"none" if plane is None else b"")
    return f"{width}x{height} px, SHA-256 {digest.hexdigest()[:DIGITS]}"


def plain(value: Any) -> Any:
    """An argument as a value of JSON; files and arrays by their digests."""
    if isinstance(value, os.PathLike):
        return f"a file, SHA-256 {sha256_of_file(Path(value))[:DIGITS]}"
    if value is None or isinstance(value, str | int | float):
        return value
    array = np.asarray(value)
    if not array.ndim:
        return array.item()
    digest = hashlib.sha256(_bytes_of(array))
    return f"{array.dtype} {list(array.shape)}, SHA-256 {digest.hexdigest()[:DIGITS]}"


def _require_whole(path: Path) -> None:
    """Refuse a file whose digest at its end is another."""
    size = hashlib.sha256().digest_size
    left, digest = path.stat().st_size - size, hashlib.sha256()
    with open(path, "rb", opener=only_files) as file:
        while data := file.read(min(1 << 20, max(0, left))):
            digest.update(data)
            left -= len(data)
        if file.read() != digest.digest():
            raise ValueError


def _arrays_in(path: Path) -> dict[Any, Any]:
    """The arrays of a checkpoint. They are read one by one: a mapped file would stand in memory beside them."""
    header = safetensors_header(path)
    del header["sha256"]
    arrays: dict[Any, Any] = {}
    with open(path, "rb", opener=only_files) as file:
        for name, (spec, start, length) in header.items():
            file.seek(start)
            array = np.fromfile(file, np.uint8, length)
            arrays[tuple(json.loads(name))] = array.view(spec.dtype).reshape(spec.shape)
    return arrays


def _metadata_of(path: Path) -> dict[str, Any]:
    return {name: json.loads(value) for name, value in safetensors_metadata(path).items()}


def _bytes_of(array: Any) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _shown(*values: Any) -> list[str]:
    """Two values as short texts. Long ones are cut so that the place where they differ is seen."""
    texts = [repr(value) if isinstance(value, str) else str(value) for value in values]
    texts = ["the default" if value is None else text for value, text in zip(values, texts, strict=True)]
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
    start = max(0, same - SHOWN // 2) if max(map(len, texts)) > SHOWN else 0
    cut = [text[start:] if len(text) <= start + SHOWN else f"{text[start : start + SHOWN]}..." for text in texts]
    return [f"...{text}" for text in cut] if start else cut
