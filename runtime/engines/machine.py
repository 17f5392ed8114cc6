"""This machine, as far as it decides which engines run. No package of a backend is imported."""

import contextlib
import ctypes
import importlib
import os
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from tilewright.runtime.bundle.manifest import DEVICES
from tilewright.runtime.engines import BACKENDS
from tilewright.runtime.engines.choose import Machine

__all__ = ["this_machine", "usable_cores"]

CPUINFO = Path("/proc/cpuinfo")
CUDA = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
VARIANTS = {"onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino")}  # other packages with the same module


def this_machine(packages: Iterable[str] = (), kinds: Collection[str] = DEVICES) -> Machine:
    """This machine, with the versions of these packages, and only with devices of these kinds."""
    capability = _compute_capability() if "cuda" in kinds else None
    here = ("cpu", *(["cuda"] if capability else []))
    modules = {name: importlib.import_module(module) for name, module in BACKENDS.items()}
    missing = {name: reason for name, module in modules.items() if (reason := module.missing())}
    named = {package for module in modules.values() for package in module.PACKAGES} | set(packages)
    versions = {package: version for package in sorted(named) if (version := _version(package))}
    return Machine(
        cores=usable_cores(),
        devices=tuple(kind for kind in here if kind in kinds),
        instructions=_instructions(),
        compute_capability=capability,
        backends=tuple(name for name in modules if name not in missing),
        missing=missing,
        packages=versions,
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _instructions() -> tuple[str, ...]:
    """The instruction sets of the CPU; none where the system does not tell."""
    with contextlib.suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, names = line.partition(":")
            if name.strip() in ("flags", "Features"):  # x86, Arm
                return tuple(sorted(names.split()))
    return ()


def _version(package: str) -> str | None:
    for name in (package, *VARIANTS.get(package, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _compute_capability() -> tuple[int, int] | None:
    """The least compute capability of the GPUs, by their driver; none without a GPU."""
    try:
        driver = ctypes.CDLL(CUDA)
    except OSError:
        return None
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return None
    capabilities = []
    for number in range(count.value):
        device, parts = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
        failed = driver.cuDeviceGet(ctypes.byref(device), number)
        for attribute, part in zip((MAJOR, MINOR), parts, strict=True):
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(part), attribute, device)
        if not failed:
            capabilities.append((parts[0].value, parts[1].value))
    return min(capabilities, default=None)
