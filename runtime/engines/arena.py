"""The memory that ONNX Runtime takes for the values inside of calls.

Usually each session has an arena of its own, which keeps the memory of the largest call until the session ends. Here
all sessions of a process share one arena, so the largest call of all counts once. The arena gives free blocks back when
an engine is opened or closed.
"""

import contextlib
import ctypes
import logging
from functools import cache
from typing import Any

__all__ = ["give_back", "take_shared", "trim"]

# the first block; each further one is twice the size of the one before. Many small blocks leave gaps that nothing fits
BLOCKS = {"initial_chunk_size_bytes": 2**25, "initial_growth_chunk_size_bytes": 2**25}
LOG = logging.getLogger("tilewright")
# a graph of one node, y = Identity(x): ONNX Runtime gives back blocks of an arena only at the end of a call
IDENTITY = (
    b"\x08\x07:7\n\x10\n\x01x\x12\x01y"
    b'"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n'
    b"\x02\x08\x01B\x04\n\x00\x10\r"
)


def take_shared(options: Any) -> None:
    """Let a session with these options use the shared arena."""
    _register()
    options.add_session_config_entry("session.use_env_allocators", "1")


def give_back() -> None:
    """Give memory that is free to the system: blocks of the arena, and those of the C library's allocator."""
    import numpy as np
    import onnxruntime as ort

    options = ort.RunOptions()
    options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
    _identity().run(None, {"x": np.zeros(1, np.float32)}, options)
    trim()


def trim() -> None:
    """Give memory that the C library's allocator holds free to the system."""
    with contextlib.suppress(OSError, AttributeError, TypeError):  # other C libraries than glibc keep none, or cannot
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _register() -> None:
    import onnxruntime as ort

    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    try:
        ort.create_and_register_allocator(place, ort.OrtArenaCfg(BLOCKS))
    except Exception as error:  # ONNX Runtime's exceptions share no base class
        LOG.debug("this process has a shared arena of ONNX Runtime already: %s", error)


@cache
def _identity() -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    take_shared(options)
    return ort.InferenceSession(IDENTITY, options, providers=["CPUExecutionProvider"])
