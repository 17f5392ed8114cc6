"""A GPU through NVIDIA's driver, by ctypes: memory, copies, a stream, and recorded work. No package is needed.

The names and numbers are those of `cuda.h`. Libraries that use the CUDA runtime share the driver's primary context.
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable
from threading import RLock
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.runtime.engines import machine
from tilewright.runtime.errors import EnvironmentMismatch, ResourceError, TilewrightError

__all__ = ["Gpu", "Recording", "Tensor", "first_gpu"]

OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
NOT_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: it does not wait for the default stream
ONE_THREAD = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
NAME_BYTES = 256

Address = ctypes.c_uint64
Handle = ctypes.c_void_p
Array = npt.NDArray[Any]
FUNCTIONS: dict[str, tuple[Any, ...]] = {  # those with arguments that are no pointers and no `int`
    "cuInit": (ctypes.c_uint,),
    "cuDeviceGet": (Handle, ctypes.c_int),
    "cuDeviceGetName": (Handle, ctypes.c_int, ctypes.c_int),
    "cuDevicePrimaryCtxRetain": (Handle, ctypes.c_int),
    "cuCtxSetCurrent": (Handle,),
    "cuMemGetInfo_v2": (Handle, Handle),
    "cuMemAlloc_v2": (Handle, ctypes.c_size_t),
    "cuMemFree_v2": (Address,),
    "cuStreamCreate": (Handle, ctypes.c_uint),
    "cuStreamSynchronize": (Handle,),
    "cuMemcpyHtoDAsync_v2": (Address, Handle, ctypes.c_size_t, Handle),
    "cuMemcpyDtoHAsync_v2": (Handle, Address, ctypes.c_size_t, Handle),
    "cuMemcpyDtoDAsync_v2": (Address, Address, ctypes.c_size_t, Handle),
    "cuStreamBeginCapture_v2": (Handle, ctypes.c_int),
    "cuStreamEndCapture": (Handle, Handle),
    "cuGraphInstantiateWithFlags": (Handle, Handle, ctypes.c_ulonglong),
    "cuGraphLaunch": (Handle, Handle),
    "cuGraphExecDestroy": (Handle,),
    "cuGraphDestroy": (Handle,),
}


class Gpu:
    """One GPU with one stream, for one thread at a time: `with gpu:` waits for it, and makes it current.

    What another thread put into the stream while a call is recorded would become a part of the recording.
    """

    def __init__(self, number: int = 0) -> None:
        try:
            self.driver = ctypes.CDLL(machine.CUDA)
            for name, types in FUNCTIONS.items():
                getattr(self.driver, name).argtypes = types
        except (OSError, AttributeError) as error:
            raise EnvironmentMismatch(f"no GPU here: NVIDIA's driver does not load ({error})") from None
        device, context, stream = ctypes.c_int(), Handle(), Handle()
        text = ctypes.create_string_buffer(NAME_BYTES)
        self.call("cuInit", 0)
        self.call("cuDeviceGet", ctypes.byref(device), number)
        self.call("cuDeviceGetName", text, NAME_BYTES, device)
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.name, self.context = text.value.decode(errors="replace"), context
        self.lock, self.recording = RLock(), False
        self.freed: list[Block] = []  # while a call was recorded, or another thread had the GPU
        with self:
            self.call("cuStreamCreate", ctypes.byref(stream), NOT_BLOCKING)
        self.stream = int(stream.value or 0)
        self.scratch = Block(self, 0)  # all engines use it in turn

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function of the driver. A code that is not zero is an error."""
        code = getattr(self.driver, name)(*arguments)
        if code == OUT_OF_MEMORY:
            raise ResourceError(f"GPU memory is full ({name}); use a smaller --tile, a smaller --batch or --memory low")
        if code:
            raise EnvironmentMismatch(f"NVIDIA's driver refuses {name} with code {code}; see nvidia-smi")

    def __enter__(self) -> "Gpu":
        self.lock.acquire()
        try:
            self.call("cuCtxSetCurrent", self.context)
        except BaseException:
            self.lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if not self.recording:
                self._free_dropped()
        finally:
            self.lock.release()

    def _free_dropped(self) -> None:
        if self.freed:
            self.wait()  # work in the stream may still use it
        while self.freed:
            self.freed.pop().free()

    def memory(self) -> tuple[int, int]:
        """The bytes of its memory that are free, and all."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def wait(self) -> None:
        """Wait for all work in the stream."""
        self.call("cuStreamSynchronize", self.stream)

    def fill(self, address: int, array: Array) -> None:
        """Copy an array to the GPU. The array must stay as it is until `wait`."""
        self.call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)

    def read(self, address: int, array: Array) -> None:
        """Copy from the GPU into an array, which is complete after `wait`."""
        self.call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)

    def copy(self, to: int, address: int, size: int) -> None:
        """Copy inside of the GPU."""
        self.call("cuMemcpyDtoDAsync_v2", to, address, size, self.stream)

    def shared(self, size: int) -> int:
        """The address of memory for the values inside of calls, at least so large. A larger size moves it."""
        if size > self.scratch.size:
            self.wait()
            self.scratch.free()
            self.scratch = Block(self, size)
        return self.scratch.address

    def record(self, work: Callable[[], None]) -> "Recording":
        """Record the work that a function puts into the stream. Nothing runs."""
        graph, runnable = Handle(), Handle()
        self.call("cuStreamBeginCapture_v2", self.stream, ONE_THREAD)
        self.recording = True
        try:
            work()
        finally:
            self.recording = False
            self.call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
            self._free_dropped()
        self.call("cuGraphInstantiateWithFlags", ctypes.byref(runnable), graph, 0)
        self.call("cuGraphDestroy", graph)
        return Recording(self, int(runnable.value or 0))


class Block:
    """Memory of a GPU."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.gpu, self.size, self.address = gpu, size, 0
        if size:
            address = Address()
            gpu.call("cuMemAlloc_v2", ctypes.byref(address), size)
            self.address = address.value

    def free(self) -> None:
        """Give it back."""
        if self.address:
            self.gpu.call("cuMemFree_v2", self.address)
            self.address = self.size = 0


class Tensor:
    """An array in the memory of a GPU. The memory goes back with the last name of the tensor."""

    def __init__(self, gpu: Gpu, shape: tuple[int, ...], dtype: Any, holder: Any = None) -> None:
        self.gpu, self.shape, self.dtype = gpu, shape, np.dtype(dtype)
        self.holder = holder  # the device that gives it to the host
        self.nbytes = self.dtype.itemsize * int(np.prod(shape))
        with gpu:
            self.block = Block(gpu, max(1, self.nbytes))

    @property
    def address(self) -> int:
        """The place of its first number."""
        return self.block.address

    def array(self) -> Array:
        """Its numbers, after all work before."""
        array = np.empty(self.shape, self.dtype)
        with self.gpu:
            self.gpu.read(self.address, array)
            self.gpu.wait()
        return array

    def __del__(self) -> None:
        # the garbage collector comes in any thread: it must not wait for another one, nor break a recording
        with contextlib.suppress(TilewrightError, AttributeError):  # the driver may have ended, or there is no memory
            self.gpu.freed.append(self.block)
            if self.gpu.lock.acquire(blocking=False):
                try:
                    with self.gpu:  # the lock is this thread's already; the end of the block frees what was dropped
                        pass
                finally:
                    self.gpu.lock.release()


class Recording:
    """Recorded work, which can run again with the same addresses."""

    def __init__(self, gpu: Gpu, runnable: int) -> None:
        self.gpu, self.runnable = gpu, runnable

    def run(self) -> None:
        """Put the work into the stream."""
        self.gpu.call("cuGraphLaunch", self.runnable, self.gpu.stream)

    def free(self) -> None:
        """Give its memory back."""
        self.gpu.call("cuGraphExecDestroy", self.runnable)


@functools.cache
def first_gpu() -> Gpu:
    """The first GPU, shared by all engines of this process."""
    return Gpu()
