"""Packages of AOTInductor: machine code that PyTorch made of a network. Only PyTorch is needed, not the network's code.

A package holds no weights. It reads them where they lie, mapped from their files.
"""

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.bundle.manifest import EngineSpec
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.engines import Opening
from tilewright.runtime.engines.driver import Tensor, first_gpu
from tilewright.runtime.engines.explained import DAMAGED, MEMORY, OTHER_GRAPH, OTHER_SIZE, Reason, explained
from tilewright.runtime.engines.machine import usable_cores
from tilewright.runtime.errors import BundleError, EnvironmentMismatch, ResourceError, TilewrightError, UsageError

__all__ = ["PACKAGES", "SIZES", "AotiEngine", "missing", "open_engine", "open_package", "version"]

PACKAGES = ("torch",)
SIZES = "sizes"  # of each input, in a package: see `sizes_of` in export/graph/trace.py
ANEW = "compile it again with 'tilewright export compile BUNDLE --target aoti'"

# words of PyTorch's messages, the error that they mean, and what to do; the first that fit count
REASONS: tuple[Reason, ...] = (
    ("out of memory|can't allocate|bad_alloc|not enough memory", ResourceError, MEMORY),
    (
        "no space left|write .*failed",
        ResourceError,
        "free some of the disk behind TMPDIR, where PyTorch unpacks packages",
    ),
    ("undefined symbol|cannot open shared object|no kernel image|failed to dlopen", EnvironmentMismatch, ANEW),
    ("zip|archive|central directory|failed to (find|load) .*\\.so|model.*not found", BundleError, DAMAGED),
)
NOISE = re.compile(r"Exception raised from .*$|\bCHECK failed: ?|\(most recent call first\).*$|^Error in \w+: ?")


def missing() -> str | None:
    """What is needed to run packages here, or none."""
    if importlib.util.find_spec("torch") is None:
        return "needs PyTorch: pip install torch"
    return None


def version() -> str:
    """The name and version of PyTorch."""
    return f"torch {metadata.version('torch')}"


_explained = partial(explained, version, REASONS, NOISE)


class AotiEngine:
    """One package with its weights. As many calls may run at the same time as it was opened for; others wait."""

    def __init__(self, loader: Any, weights: Mapping[str, Any], package: Path, *, device: str, threads: int) -> None:
        told = loader.get_metadata()
        self.loader, self.weights, self.package = loader, weights, package
        self.device, self.threads = device, threads
        self.sizes: dict[str, list[int | list[Any]]] = json.loads(told[SIZES])
        self.types: dict[str, str] = json.loads(told["types"])
        self.outputs: list[str] = json.loads(told["outputs"])

    def run(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Any]:
        """Compute these outputs from the inputs."""
        with self._turn():
            return {name: tensor.cpu().numpy() for name, tensor in self._called(inputs, list(outputs)).items()}

    def run_on(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> dict[str, Tensor]:
        """The same on a GPU, with outputs that stay there. Inputs may be tensors there."""
        import torch

        tensors = {}
        with first_gpu() as gpu:
            for name, value in self._called(inputs, list(outputs)).items():
                torch.cuda.synchronize()  # PyTorch has a stream of its own
                value = value.contiguous()
                kind = np.dtype(str(value.dtype).removeprefix("torch."))
                tensors[name] = Tensor(gpu, tuple(value.shape), kind)
                gpu.copy(tensors[name].address, value.data_ptr(), tensors[name].nbytes)
                gpu.wait()  # until then PyTorch's tensor must stay
        return tensors

    def _turn(self) -> AbstractContextManager[Any]:
        """The GPU for this thread alone, or nothing to wait for on a CPU."""
        return first_gpu() if self.device.startswith("cuda") else nullcontext()

    def _called(self, inputs: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
        import torch

        self._check(inputs, names)
        if torch.get_num_threads() != self.threads:  # each thread that calls has a number of its own
            torch.set_num_threads(self.threads)
        try:
            feed = {name: self._tensor(inputs[name]) for name in self.sizes}
            rows = max((len(feed[name]) for name, sizes in self.sizes.items() if _rows(sizes)), default=1)
            for name, sizes in self.sizes.items():
                if _rows(sizes) and len(feed[name]) < rows:  # one row for all tiles
                    feed[name] = feed[name].expand(rows, *feed[name].shape[1:]).contiguous()
            results = dict(zip(self.outputs, self.loader.boxed_run([*feed.values()]), strict=True))
            return {name: results[name] for name in names}
        except Exception as error:
            raise _explained(self.package, "failed", error) from error

    def _tensor(self, value: Any) -> Any:
        """PyTorch's tensor for an array, or for a tensor of the driver."""
        import torch

        if isinstance(value, Tensor):
            value.gpu.wait()
            return torch.as_tensor(_View(value), device=self.device)
        array = np.require(value, requirements=("C", "W"))  # PyTorch wants memory that it may write to
        return torch.from_numpy(array).to(self.device)

    def _check(self, inputs: Mapping[str, Any], outputs: Iterable[str]) -> None:
        """Refuse inputs that the package does not take. Machine code does not check, and would read other memory."""
        if unknown := sorted(inputs.keys() - self.sizes.keys()):
            raise BundleError(f"{self.package}: has no input {unknown[0]!r}; {OTHER_GRAPH}")
        if unknown := sorted(set(outputs) - set(self.outputs)):
            raise BundleError(f"{self.package}: has no output {unknown[0]!r}; {OTHER_GRAPH}")
        if lacking := sorted(self.sizes.keys() - inputs.keys()):
            raise BundleError(f"{self.package}: input {lacking[0]!r} is missing; {OTHER_GRAPH}")
        units: dict[str, int] = {}  # free size -> its units
        for name in sorted(self.sizes, key=lambda name: -max((*inputs[name].shape[:1], 0))):  # most rows first
            sizes, shape, dtype = self.sizes[name], inputs[name].shape, inputs[name].dtype
            if dtype != self.types[name]:
                raise BundleError(f"{self.package}: input {name!r} is {dtype}, not {self.types[name]}; {OTHER_GRAPH}")
            rows = units.get("batch", 1)
            whole = (rows, *shape[1:]) if _rows(sizes) and shape[:1] == (1,) else shape
            if len(whole) != len(sizes) or not all(map(_fits, whole, sizes, [units] * len(whole))):
                raise UsageError(f"{self.package}: input {name!r} has sizes {list(shape)}; {OTHER_SIZE}")

    def close(self) -> None:
        """Free the memory."""
        self.loader, self.weights = None, {}


class _View:
    """Memory of a GPU as PyTorch reads it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.__cuda_array_interface__ = {
            "shape": tensor.shape,
            "typestr": tensor.dtype.str,
            "data": (tensor.address, False),
            "version": 3,
        }


def _rows(sizes: list[int | list[Any]]) -> bool:
    return bool(sizes) and isinstance(sizes[0], list) and sizes[0][0] == "batch"


def _fits(size: int, expected: int | list[Any], units: dict[str, int]) -> bool:
    """Whether a size is as expected, and equals those of the same name."""
    if isinstance(expected, int):
        return size == expected
    name, multiple, most = expected
    count, rest = divmod(size, multiple)
    return not rest and 1 <= count <= most and units.setdefault(name, count) == count


def open_engine(bundle: Bundle, component: str, spec: EngineSpec, opening: Opening) -> AotiEngine:
    """Open an engine of a component. Weights are mapped from their own files, in every mode of memory."""
    references = bundle.weights.tensors.get(spec.weights or component, {})
    folders = {name: bundle.folder(name, opening.weights_dir) for name in {r.folder for r in references.values()}}
    places = {name: (folders[r.folder] / r.file, r) for name, r in references.items()}
    package, computed = (bundle.path(file) for file in spec.files)
    return open_package(package, computed, places, device=spec.device, threads=opening.threads, calls=opening.calls)


def open_package(
    package: Path,
    computed: Path,
    weights: Mapping[str, tuple[Path, Reference]],
    *,
    device: str = "cpu",
    threads: int = 0,
    calls: int = 1,
) -> AotiEngine:
    """Open a package. `computed`: the file of the constants that its network computed. `weights`: each one's file."""
    try:
        import torch

        loader = torch._C._aoti.AOTIModelPackageLoader(str(package), "model", False, calls, -1)
        constants = _constants(computed)
        needed = [name for name in loader.get_constant_fqns() if name not in constants]
        if lacking := sorted(set(needed) - weights.keys()):
            raise BundleError(f"{package}: reads weight {lacking[0]!r}, which the bundle does not list; {ANEW}")
        constants |= {name: _mapped(*weights[name]) for name in needed}
        constants = {name: tensor.to(device) for name, tensor in constants.items()}
        loader.load_constants(constants, False, True, True)  # all of them, and they stay where they are
    except TilewrightError:
        raise
    except Exception as error:
        raise _explained(package, "refuses the package", error) from error
    return AotiEngine(loader, constants, package, device=device, threads=threads or usable_cores())


def _constants(file: Path) -> dict[str, Any]:
    """The constants that the network computed."""
    places = safetensors_header(file).items()
    return {
        n: _mapped(file, Reference(file.name, s.dtype, _shape(s.shape), at, length)) for n, (s, at, length) in places
    }


def _shape(shape: tuple[int | str, ...]) -> tuple[int, ...]:
    return tuple(int(size) for size in shape)


def _mapped(file: Path, reference: Reference) -> Any:
    """A tensor over the bytes in a file, or a copy if their place is no multiple of their width."""
    import torch

    dtype = getattr(torch, reference.dtype)
    if not reference.length:
        return torch.empty(reference.shape, dtype=dtype)
    data = torch.from_numpy(np.memmap(file, np.uint8, "c", reference.offset, (reference.length,)))
    if data.data_ptr() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).reshape(reference.shape)
