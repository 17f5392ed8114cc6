"""Folders that all workers of a run share, each filled once."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest

__all__ = ["Shared", "filled_once", "folder_of_run"]

Shared = Callable[[str, Callable[[Path], object]], Path]


def folder_of_run(factory: pytest.TempPathFactory) -> Path:
    """The folder of temporary files of this run, whichever worker asks."""
    own = factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


def filled_once(folder: Path, fill: Callable[[Path], object]) -> Path:
    """The folder, filled by the first worker that asks for it; the others wait."""
    folder.parent.mkdir(exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.fstat(lock.fileno()).st_size:  # nobody has written, while we waited, that it is filled
            fill(folder)
            lock.write("filled")
    return folder
