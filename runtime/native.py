"""Restoring images with the C++ library, through ctypes.

The library reads and runs the bundle. Python reads the images, and makes ids of words.
"""

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.bundle.arguments import Argument
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.weights import checked_folder
from tilewright.runtime.engines.ort import native_library
from tilewright.runtime.errors import (
    AccuracyError,
    BundleError,
    DeviceError,
    EnvironmentMismatch,
    InputError,
    ResourceError,
    TilewrightError,
    UsageError,
)
from tilewright.runtime.images.read import Picture, read_image
from tilewright.runtime.inputs import gather, seconds, value_of, whole
from tilewright.runtime.memory.estimate import MEMORY_MODES
from tilewright.runtime.memory.machine import bytes_of, peak_bytes
from tilewright.runtime.plan.noise import WORD_MAX
from tilewright.runtime.sitting import Restoration

__all__ = ["NativeRestorer", "load_native"]

OURS = Path(__file__).parents[1] / "build" / "cpp" / "libtilewright.so"  # what `make cpp` builds in a clone
INT32_MAX = 2**31 - 1
ERRORS = (AccuracyError, BundleError, DeviceError, EnvironmentMismatch, InputError, ResourceError, UsageError)
KINDS = {kind.exit_code: kind for kind in ERRORS}  # status -> its error


# ---- tilewright.h


class Params(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("threads", ctypes.c_int32),
        ("low_memory", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("engine", ctypes.c_char_p),
        ("weights_dir", ctypes.c_char_p),
        ("expect", ctypes.c_char_p),
        ("native_library", ctypes.c_char_p),
        ("devices", ctypes.c_char_p),
        ("memory_limit", ctypes.c_int64),
        ("deadline_s", ctypes.c_double),
        ("fresh", ctypes.c_int32),
    )


class Image(ctypes.Structure):
    _fields_ = (
        ("width", ctypes.c_int32),
        ("height", ctypes.c_int32),
        ("format", ctypes.c_int),
        ("stride", ctypes.c_size_t),
        ("pixels", ctypes.c_void_p),
    )


class Value(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("text", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
    )


class Part(ctypes.Structure):
    _fields_ = (("top", ctypes.c_int32), ("left", ctypes.c_int32), ("image", Image))


ON_PROGRESS = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
ON_PART = ctypes.CFUNCTYPE(None, ctypes.POINTER(Part), ctypes.c_void_p)
IS_CANCELLED = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p)
ON_NOTE = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_void_p)


class Options(ctypes.Structure):
    _fields_ = (
        ("size", ctypes.c_size_t),
        ("seed", ctypes.c_int64),
        ("tile", ctypes.c_int32),
        ("overlap", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("scale", ctypes.c_int32),
        ("values", ctypes.POINTER(Value)),
        ("value_count", ctypes.c_size_t),
        ("user", ctypes.c_void_p),
        ("on_progress", ON_PROGRESS),
        ("on_part", ON_PART),
        ("is_cancelled", IS_CANCELLED),
        ("on_note", ON_NOTE),
        ("bits", ctypes.c_int32),
        ("color", ctypes.c_char_p),
        ("jitter", ctypes.c_int32),
    )


class ChosenEngine(ctypes.Structure):
    _fields_ = (("component", ctypes.c_char_p), ("name", ctypes.c_char_p), ("reason", ctypes.c_char_p))


FUNCTIONS: Mapping[str, tuple[Any, ...]] = {  # name -> its result, and its arguments
    "tw_open": (ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(Params)),
    "tw_close": (None, ctypes.c_void_p),
    "tw_restore": (
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.POINTER(Image),
        ctypes.POINTER(Options),
        ctypes.POINTER(Image),
    ),
    "tw_scale": (ctypes.c_int32, ctypes.c_void_p),
    "tw_devices": (ctypes.c_char_p, ctypes.c_void_p),
    "tw_engine_count": (ctypes.c_size_t, ctypes.c_void_p),
    "tw_engine_at": (ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t, ctypes.POINTER(ChosenEngine)),
    "tw_last_error": (ctypes.c_char_p, ctypes.c_void_p),
    "tw_last_status": (ctypes.c_int32,),
    "tw_version": (ctypes.c_char_p,),
}


@cache
def library(named: str | None) -> ctypes.CDLL:
    """The C++ library at this path, or that of a clone, or that of the system's loader."""
    path = named or (str(OURS) if OURS.is_file() else "libtilewright.so.0")
    try:
        loaded = ctypes.CDLL(path)
        for name, (result, *arguments) in FUNCTIONS.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        advice = "run make cpp, or set TILEWRIGHT_LIBRARY to the path of libtilewright.so"
        raise EnvironmentMismatch(f"no C++ library of Tilewright can be used ({error}); {advice}") from None
    theirs, ours = loaded.tw_version().decode().partition(",")[0], version("tilewright")
    if theirs != ours:
        raise EnvironmentMismatch(f"{path} has version {theirs}, and this package {ours}; install the same versions")
    return loaded


# ---- the restorer


def load_native(
    path: str | os.PathLike[str] | Bundle,
    *,
    engine: str | None = None,
    memory: str = "fast",
    devices: Sequence[str] = ("cpu:0",),
    threads: int = 0,
    batch: int | None = None,
    weights_dir: str | os.PathLike[str] | None = None,
    expect: str | None = None,
    fresh: bool = False,
    memory_limit: int | str | None = None,
    deadline_s: float | None = None,
) -> "NativeRestorer":
    """Open a bundle with the C++ library; options as for `load`.

    The library is the file TILEWRIGHT_LIBRARY, or what `make cpp` has built, or what the system's loader finds.
    """
    if memory not in MEMORY_MODES:
        raise UsageError(f"memory={memory!r} is not one of {', '.join(MEMORY_MODES)}")
    lib = library(os.environ.get("TILEWRIGHT_LIBRARY") or None)
    bundle = path if isinstance(path, Bundle) else read_bundle(path, expect=expect, fresh=fresh)
    limit = bytes_of(memory_limit) if isinstance(memory_limit, str) else memory_limit
    folder, kernels = checked_folder(weights_dir), native_library()
    params = Params(
        size=ctypes.sizeof(Params),
        threads=whole("threads", threads, 0, INT32_MAX),
        low_memory=memory == "low",
        batch=0 if batch is None else whole("batch", batch, 1, INT32_MAX),
        engine=None if engine is None else engine.encode(),
        weights_dir=None if folder is None else os.fsencode(folder),
        expect=bundle.digest.encode(),
        native_library=b"" if kernels is None else os.fsencode(kernels),
        devices=",".join(devices).encode(),
        memory_limit=0 if limit is None else whole("memory_limit", limit, 1, 2**63 - 1),
        deadline_s=0.0 if deadline_s is None else seconds("deadline_s", deadline_s),
        fresh=fresh,
    )
    handle = lib.tw_open(os.fsencode(bundle.root), ctypes.byref(params))
    if not handle:
        raise _error(lib, lib.tw_last_status())
    return NativeRestorer(lib, handle, bundle)


def _error(lib: ctypes.CDLL, status: int) -> TilewrightError:
    """The last failure of this thread."""
    return KINDS.get(status, TilewrightError)(lib.tw_last_error(None).decode(errors="replace"))


class NativeRestorer:
    """A bundle that the C++ library has opened. It is a context manager."""

    def __init__(self, lib: ctypes.CDLL, handle: int, bundle: Bundle) -> None:
        self.lib, self.handle, self.bundle = lib, handle, bundle

    def __enter__(self) -> "NativeRestorer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the bundle. Closing it again does nothing."""
        self.lib.tw_close(self.handle)

    @property
    def arguments(self) -> dict[str, Argument]:
        """The bundle's arguments by name: kind, default, choices, range, one line of help."""
        return self.bundle.arguments

    @property
    def ran(self) -> dict[str, Any]:
        """The name of each component's engine, the devices, and the library's version, for reports."""
        row, engines = ChosenEngine(), {}
        for index in range(self.lib.tw_engine_count(self.handle)):
            if not self.lib.tw_engine_at(self.handle, index, ctypes.byref(row)) and not row.reason:
                engines[row.component.decode()] = row.name.decode()
        devices = (self.lib.tw_devices(self.handle) or b"").decode().split(",")
        return {"engines": engines, "devices": devices, "library": self.lib.tw_version().decode()}

    def __call__(self, image: Any, **options: Any) -> Any:
        """The restored image as uint8, with the layout of the source; options as for `restore`."""
        return self.restore(image, **options).image

    def restore(
        self,
        image: Any,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        seed: int = 0,
        steps: int | None = None,
        scale: int | None = None,
        color: str = "off",
        jitter: bool = False,
        max_pixels: int = 100_000_000,
        on_progress: Callable[[str, int, int], None] | None = None,
        on_part: Callable[[int, int, npt.NDArray[Any]], None] | None = None,
        **arguments: Any,
    ) -> Restoration:
        """Restore an image and measure it; options as for `Restorer.sitting`. Safe from any thread."""
        start = time.perf_counter()
        arrays = self._arrays(arguments)
        values = _values(arrays)
        picture = read_image(image, max_pixels=whole("max_pixels", max_pixels, 1))
        read = time.perf_counter()
        source = _joined(picture)
        scale = self.lib.tw_scale(self.handle) if scale is None else whole("scale", scale, 1, INT32_MAX)
        result = np.empty((source.shape[0] * scale, source.shape[1] * scale, *source.shape[2:]), np.uint8)
        options = Options(
            size=ctypes.sizeof(Options),
            seed=whole("seed", seed, 0, WORD_MAX),
            tile=0 if tile is None else whole("tile", tile, 1, INT32_MAX),
            overlap=-1 if overlap is None else whole("overlap", overlap, 0, INT32_MAX),
            steps=0 if steps is None else whole("steps", steps, 1, INT32_MAX),
            scale=scale,
            values=values,
            value_count=len(values),
            color=color.encode(),
            jitter=jitter,
        )
        notes = self._run(source, options, result, on_progress, on_part)
        spent = {"read": read - start, "restore": time.perf_counter() - read}
        ran = self.ran
        engines, devices, icc, exif = ran["engines"], tuple(ran["devices"]), picture.icc, picture.exif
        return Restoration(result, scale, icc, exif, spent, {}, peak_bytes(), engines, devices, tuple(notes))

    def _arrays(self, arguments: Mapping[str, Any]) -> dict[str, npt.NDArray[Any]]:
        """The caller's arguments as arrays for the program."""
        program, tensors = self.bundle.program, gather(self.bundle, arguments)
        arrays = {n: value_of(program, n, tensors, {}) if n in program.inputs else t for n, t in tensors.items()}
        return {name: np.ascontiguousarray(array) for name, array in arrays.items()}

    def _run(
        self,
        source: npt.NDArray[Any],
        options: Options,
        result: npt.NDArray[Any],
        on_progress: Callable[[str, int, int], None] | None,
        on_part: Callable[[int, int, npt.NDArray[Any]], None] | None,
    ) -> list[str]:
        """Restore on a thread of its own, because a signal's exception may not be raised in a callback of C."""
        stop, faults, notes = threading.Event(), list[BaseException](), list[str]()

        def guarded(function: Callable[..., None]) -> Callable[..., None]:
            def call(*words: Any) -> None:
                try:
                    if not stop.is_set():
                        function(*words)
                except BaseException as error:
                    faults.append(error)
                    stop.set()

            return call

        def part(pointer: Any, user: Any) -> None:
            assert on_part is not None
            image = pointer.contents.image
            stride = image.stride or 3 * image.width
            data = ctypes.string_at(image.pixels, (image.height - 1) * stride + 3 * image.width)
            pixels = np.ndarray((image.height, image.width, 3), np.uint8, data, 0, (stride, 3, 1))
            on_part(pointer.contents.top, pointer.contents.left, pixels)

        def progress(name: bytes, done: int, total: int, user: Any) -> None:
            assert on_progress is not None
            on_progress(name.decode(), done, total)

        options.is_cancelled = IS_CANCELLED(lambda user: int(stop.is_set()))
        options.on_note = ON_NOTE(guarded(lambda note, user: notes.append(note.decode())))
        if on_progress:
            options.on_progress = ON_PROGRESS(guarded(progress))
        if on_part:
            options.on_part = ON_PART(guarded(part))
        images = [
            Image(array.shape[1], array.shape[0], array.shape[2] if array.ndim == 3 else 1, 0, array.ctypes.data)
            for array in (source, result)
        ]

        def call() -> None:
            status = self.lib.tw_restore(self.handle, images[0], options, images[1])
            if faults:
                raise faults[0]
            if status:
                raise _error(self.lib, status)

        with ThreadPoolExecutor(1, "native") as pool:
            try:
                pool.submit(call).result()
            finally:
                stop.set()
        return notes


def _values(arrays: Mapping[str, npt.NDArray[Any]]) -> "ctypes.Array[Value]":
    """Arrays for the library, which live as long as these."""
    rows = (Value * len(arrays))()
    for row, (name, array) in zip(rows, arrays.items(), strict=True):
        row.name, row.dtype, row.rank = name.encode(), str(array.dtype).encode(), array.ndim
        row.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        row.data = array.ctypes.data
    return rows


def _joined(picture: Picture) -> npt.NDArray[np.uint8]:
    """The pixels as the source had them: grey or colour, with alpha or without."""
    colour = picture.rgb[:, :, 0] if picture.grey else picture.rgb
    pixels = colour if picture.alpha is None else np.dstack((colour, picture.alpha))
    return np.ascontiguousarray(pixels, np.uint8)
