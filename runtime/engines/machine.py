"""This machine, as far as it decides which engines run. No package of a backend is imported."""

import contextlib
import ctypes
import importlib
import os
import platform
from collections.abc import Collection, Iterable
from importlib import metadata
from pathlib import Path

from tilewright.runtime.bundle.manifest import DEVICES
from tilewright.runtime.engines import BACKENDS
from tilewright.runtime.engines.choose import Machine

__all__ = ["compute_capability", "processor", "this_machine", "usable_cores"]

CPUINFO = Path("/proc/cpuinfo")
CUDA = "libcuda.so.1"
MAJOR, MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
NUMBERS = ("cpu family", "model", "stepping", "CPU implementer", "CPU part")  # x86, Arm
VARIANTS = {  # other packages with the same module
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime-openvino"),
    "tensorrt": ("tensorrt-cu13", "tensorrt-cu12"),
}


def this_machine(packages: Iterable[str] = (), kinds: Collection[str] = DEVICES) -> Machine:
    """This machine, with the versions of these packages, and only with devices of these kinds."""
    capability = compute_capability() if "cuda" in kinds else None
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
        processor=processor(),
    )


def usable_cores() -> int:
    """The cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """The name of the CPU with its numbers. Virtual machines give one name to many kinds of CPU."""
    facts = _cpu_facts()
    numbers = [f"{key.removeprefix('cpu ')} {facts[key]}" for key in NUMBERS if key in facts]
    return ", ".join([facts.get("model name", platform.machine()), *numbers])


def _instructions() -> tuple[str, ...]:
    """The instruction sets of the CPU; none where the system does not tell."""
    facts = _cpu_facts()
    return tuple(sorted(facts.get("flags", facts.get("Features", "")).split()))  # x86, Arm


def _cpu_facts() -> dict[str, str]:
    """What the kernel says of the first core; nothing where there is no such file."""
    try:
        first = CPUINFO.read_text().strip().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _version(package: str) -> str | None:
    for name in (package, *VARIANTS.get(package, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def compute_capability() -> tuple[int, int] | None:
    """The least compute capability of the GPUs, by their driver; none without a GPU."""
    try:
        driver = ctypes.CDLL(CUDA)
        begin = driver.cuInit
    except (OSError, AttributeError):  # no library of this name, or one that is no driver
        return None
    count = ctypes.c_int()
    if begin(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
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
