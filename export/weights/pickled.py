"""PyTorch pickles as safetensors in the cache: only tensors are loaded, never code, and few of them at a time."""

import re
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tilewright.export.weights.files import write_tensors
from tilewright.runtime.bundle import SAFETENSORS_DTYPES
from tilewright.runtime.digests import cache_dir, sha256_of_bytes, sha256_of_file
from tilewright.runtime.errors import InputError
from tilewright.runtime.program import TensorSpec
from tilewright.runtime.strict import one_line

if TYPE_CHECKING:
    import torch

__all__ = ["SUFFIXES", "as_safetensors"]

SUFFIXES = (".pt", ".bin", ".pth", ".ckpt")
VERSION = 1  # of what is written; another one converts again
WIDTHS = dict(SAFETENSORS_DTYPES.values())
PIECE = 1 << 24  # bytes that are copied at a time
RESIDENT = 1 << 26  # bytes after which a file is mapped anew, since pages that were read stay until then
AGAIN = "copy it again, or convert it to safetensors"
ALONE = "save its state_dict alone, or convert it to safetensors"


def as_safetensors(path: Path) -> Path:
    """A PyTorch pickle (.pt, .bin, .pth, .ckpt) as a safetensors file in the cache, made once."""
    if path.suffix not in SUFFIXES:
        raise _refusal(path, f"is none of {', '.join(SUFFIXES)}; convert it to safetensors")
    try:
        digest = sha256_of_file(path)
    except OSError as error:
        raise _refusal(path, f"{error.strerror}; give a file that can be read") from None
    folder = cache_dir() / "converted" / sha256_of_bytes(f"{digest} {VERSION}".encode())[:32]
    target = folder / f"{path.stem}.safetensors"
    if not target.is_file():
        tensors = _tensors(path)
        specs = {name: TensorSpec(_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
        note = f"converted by tilewright from {one_line(path.name)}"
        write_tensors(target, specs, _bytes(path, digest, tensors), note)
    return target


def _bytes(path: Path, digest: str, tensors: dict[str, "torch.Tensor"]) -> Iterator[bytes]:
    """All tensors in their order, in pieces; of a mapped file, little more than one tensor is in memory."""
    mapped, read = _can_be_mapped(path), 0
    for name in list(tensors):
        if mapped and read > RESIDENT:
            tensors.clear()
            tensors.update(_tensors(path))
            read = 0
        yield from _pieces(tensors[name])
        read += tensors[name].nbytes
    if sha256_of_file(path) != digest:
        raise _refusal(path, "was written to while it was read; try again")


def _pieces(tensor: "torch.Tensor") -> Iterator[bytes]:
    import torch

    plain = tensor.detach().resolve_neg().contiguous()
    for piece in plain.reshape(-1).view(torch.uint8).split(PIECE):
        yield piece.numpy().tobytes()


def _tensors(path: Path) -> dict[str, "torch.Tensor"]:
    """The tensors by their joined names, wider elements first: so each begins on a multiple of its width."""
    loaded, tensors = _loaded(path), {}
    if isinstance(loaded, dict) and set(loaded) == {"state_dict"} and isinstance(loaded["state_dict"], dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise _refusal(path, f"holds a {type(loaded).__name__}, not a dict of tensors; {ALONE}")
    size = path.stat().st_size
    for name, leaf in _leaves(path, loaded):
        if name in tensors or name == "__metadata__":  # which is no tensor's in a safetensors file
            taken = "is the name of two tensors" if name in tensors else "is a name that safetensors keeps for itself"
            raise _refusal(path, f"{name!r} {taken}; {ALONE}")
        if complaint := _complaint(leaf, size):
            raise _refusal(path, f"{name!r} {complaint}; {ALONE}")
        tensors[name] = leaf
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def _leaves(path: Path, loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """What nested dicts hold, under names joined with dots."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", loaded)]
    while left:
        name, value = left.pop()
        if not isinstance(value, dict):
            yield name, value
            continue
        if not value or id(value) in seen:  # a few dicts that hold each other can spell endlessly many names
            held = "is held in two places" if value else "is empty"
            raise _refusal(path, f"the dict {name!r} {held}; {ALONE}" if name else f"the dict {held}; {ALONE}")
        seen.add(id(value))
        for key, inner in reversed(value.items()):
            if type(key) not in ((str, int) if name else (str,)) or not str(key) or not str(key).isprintable():
                raise _refusal(path, f"{key!r} in {name!r} is no name of a tensor; {ALONE}")
            left.append((f"{name}.{key}" if name else key, inner))


def _complaint(leaf: Any, size: int) -> str | None:
    """Why a leaf cannot be written."""
    import torch

    if not isinstance(leaf, torch.Tensor):
        return f"is of type {type(leaf).__name__}, not a tensor"
    if leaf.layout != torch.strided or leaf.is_nested or leaf.device.type != "cpu":
        return "is a sparse, nested or meta tensor, not a plain one"
    if _dtype(leaf) not in WIDTHS:
        return f"is {_dtype(leaf)}, not one of {', '.join(sorted(WIDTHS))}"
    if not leaf.numel():
        return f"is empty, {list(leaf.shape)}"
    if leaf.nbytes > max(size, leaf.untyped_storage().nbytes()):  # strides of zero turn bytes into terabytes
        return f"would be {leaf.nbytes} bytes, from a file of {size}"
    return None


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loaded(path: Path) -> Any:
    """What the file holds, if that is data; nothing that torch says is repeated, as it advises to run the code."""
    import torch

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))
    except MemoryError:
        raise
    except Exception as error:  # whatever bytes can lead torch to: KeyError, struct.error, AttributeError, ...
        if refused := re.search(r"GLOBAL (\S+)", str(error)):
            complaint = f"holds more than tensors ({refused[1]}), which is not loaded; {ALONE}"
        else:
            complaint = f"is no file of tensors that torch.save wrote, or damaged ({type(error).__name__}); {AGAIN}"
    raise _refusal(path, complaint)


def _can_be_mapped(path: Path) -> bool:
    """Whether the bytes of its tensors lie in the file as they are: torch maps compressed ones too, and misreads."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # where torch, too, begins to look
            return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _refusal(path: Path, complaint: str) -> InputError:
    return InputError(one_line(f"weights {path}: {complaint}"))
