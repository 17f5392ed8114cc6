"""Converting PyTorch pickles to safetensors files in the cache. Only tensors are loaded, never code."""

import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tilewright.export.weights import inert
from tilewright.export.weights.writing import WIDTHS, write_tensors
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.opening import only_files
from tilewright.runtime.bundle.program import TensorSpec
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["PICKLED", "as_safetensors", "first_element", "listed"]

T = TypeVar("T")
PICKLED = (".pt", ".bin", ".pth", ".ckpt")  # endings of pickles' names
VERSION = 1  # version of converted files; a new number converts all again
PIECE = 1 << 24  # bytes copied at a time
RESIDENT = 1 << 26  # after so many bytes the file is mapped anew, which frees the pages that were read
AGAIN = "copy it again, or convert it to safetensors"
ALONE = "save its state_dict alone, or convert it to safetensors"


def listed(path: Path) -> dict[str, TensorSpec]:
    """The names, types and shapes in a PyTorch pickle, in the order of the converted file. No code of it runs."""
    return {name: TensorSpec(tensor.dtype, tensor.shape) for name, tensor in _headers(path).items()}


def first_element(path: Path, name: str) -> bytes:
    """The bytes of a tensor's first element. Nothing else is read."""
    tensor = _headers(path)[name]
    return _guarded(path, lambda: inert.element(path, tensor))


def as_safetensors(path: Path) -> Path:
    """The safetensors file in the cache of a PyTorch pickle; it is converted once."""
    _check_suffix(path)
    try:
        digest = sha256_of_file(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    folder = cache_dir() / "converted" / sha256_of_bytes(f"{digest} {VERSION}".encode())[:32]
    target = folder / f"{path.stem}.safetensors"
    if not target.is_file():
        specs = listed(path)
        tensors = dict(_leaves(path, _loaded(path)))
        if {name: TensorSpec(_dtype(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()} != specs:
            raise _refusal(path, f"holds other tensors than it lists; {AGAIN}")
        note = f"converted by tilewright from {one_line(path.name)}"
        write_tensors(target, specs, _bytes(path, digest, list(specs), tensors), note)
    return target


def _check_suffix(path: Path) -> None:
    if path.suffix not in PICKLED:
        raise _refusal(path, f"is none of {', '.join(PICKLED)}; convert it to safetensors")


def _headers(path: Path) -> dict[str, inert.Tensor]:
    """The tensors by their joined names, wider types first, so that each begins on a multiple of its width."""
    _check_suffix(path)
    loaded, tensors = _guarded(path, lambda: inert.content(path)), {}
    if not isinstance(loaded, dict):
        kind = loaded.kind if isinstance(loaded, (inert.Tensor, inert.Other)) else type(loaded).__name__
        raise _refusal(path, f"holds a {kind}, not a dict of tensors; {ALONE}")
    size = path.stat().st_size
    for name, leaf in _leaves(path, loaded):
        if name in tensors or name == "__metadata__":  # safetensors files use this name for notes
            problem = "is the name of two tensors" if name in tensors else "is a name that safetensors keeps for itself"
            raise _refusal(path, f"{name!r} {problem}; {ALONE}")
        if complaint := _complaint(leaf, size):
            raise _refusal(path, f"{name!r} {complaint}; {ALONE}")
        tensors[name] = leaf
    return dict(sorted(tensors.items(), key=lambda item: -WIDTHS[item[1].dtype]))


def _guarded(path: Path, read: Callable[[], T]) -> T:
    """The result of reading a file; whatever goes wrong becomes one line."""
    try:
        return read()
    except (MemoryError, InputError):
        raise
    except OSError as error:
        raise _unreadable(path, error) from None
    except inert.Forbidden as error:
        complaint = f"holds more than tensors ({error}), which is not loaded; {ALONE}"
    except Exception as error:  # damaged bytes cause errors of any type: KeyError, struct.error, AttributeError, ...
        complaint = f"is no file of tensors that torch.save wrote, or damaged ({type(error).__name__}); {AGAIN}"
    raise _refusal(path, complaint)


def _bytes(path: Path, digest: str, names: list[str], tensors: dict[str, "torch.Tensor"]) -> Iterator[bytes]:
    """The bytes of all tensors in this order. If the file is mapped, little more than one tensor is in memory."""
    mapped, read = _can_be_mapped(path), 0
    for name in names:
        if mapped and read > RESIDENT:
            tensors.clear()
            tensors.update(_leaves(path, _loaded(path)))
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


def _leaves(path: Path, loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """The values in nested dicts, under names joined with dots. A dict with nothing but `state_dict` is that dict."""
    if set(loaded) == {"state_dict"} and isinstance(loaded["state_dict"], dict):
        loaded = loaded["state_dict"]
    visited: set[int] = set()
    pending: list[tuple[str, Any]] = [("", loaded)]
    while pending:
        name, value = pending.pop()
        if not isinstance(value, dict):
            yield name, value
            continue
        if not value or id(value) in visited:  # a few dicts inside each other can make endless names
            problem = "is held in two places" if value else "is empty"
            raise _refusal(path, f"the dict {name!r} {problem}; {ALONE}" if name else f"the dict {problem}; {ALONE}")
        visited.add(id(value))
        for key, inner in reversed(dict.items(value)):  # an attribute in the file may hide the method
            if type(key) not in ((str, int) if name else (str,)) or not str(key) or not str(key).isprintable():
                raise _refusal(path, f"{key!r} in {name!r} is no name of a tensor; {ALONE}")
            pending.append((f"{name}.{key}" if name else key, inner))


def _complaint(leaf: Any, size: int) -> str | None:
    """A complaint about a leaf that cannot be written."""
    if isinstance(leaf, inert.Other) and leaf.tensor:
        return "is a sparse, nested or meta tensor, not a plain one"
    if not isinstance(leaf, inert.Tensor):
        return f"is of type {leaf.kind if isinstance(leaf, inert.Other) else type(leaf).__name__}, not a tensor"
    if leaf.dtype not in WIDTHS:
        return f"is {leaf.dtype}, not one of {', '.join(sorted(WIDTHS))}"
    if not leaf.nbytes:
        return f"is empty, {list(leaf.shape)}"
    if leaf.nbytes > max(size, leaf.stored):  # strides of zero make terabytes of a few bytes
        return f"would be {leaf.nbytes} bytes, from a file of {size}"
    return None


def _dtype(tensor: "torch.Tensor") -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _loaded(path: Path) -> Any:
    """The content of the file, if it is data only. PyTorch's own messages are hidden: they advise to run the code."""
    import torch

    def load() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_can_be_mapped(path))

    return _guarded(path, load)


def _can_be_mapped(path: Path) -> bool:
    """Whether tensors are stored uncompressed. PyTorch maps compressed ones too, and reads nonsense."""
    with open(path, "rb", opener=only_files) as file:
        if file.read(4) != b"PK\3\4":  # PyTorch looks at the same bytes
            return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _refusal(path: Path, complaint: str) -> InputError:
    return InputError(one_line(f"weights {path}: {complaint}"))


def _unreadable(path: Path, error: OSError) -> InputError:
    return _refusal(path, f"{error.strerror}; give a file that can be read")
