"""The memory of this machine: how much is free, and how much a process has used."""

import contextlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from tilewright.runtime.errors import UsageError

__all__ = ["available_bytes", "bytes_of", "peak_bytes", "reset_peak"]

UNITS = {"": 1, "b": 1} | {
    f"{prefix}{'i' if base == 1024 else ''}b": base**power
    for base in (1000, 1024)
    for power, prefix in enumerate("kmgt", 1)
}
CONTROL_GROUP = Path("/sys/fs/cgroup")


def available_bytes() -> int | None:
    """Memory that is free without swapping; none if the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    system = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([system, *_control_group_bytes()])


def _control_group_bytes() -> Iterable[int]:
    try:
        limit, used, table = ((CONTROL_GROUP / f"memory.{n}").read_text() for n in ("max", "current", "stat"))
    except OSError:
        return []
    parts = dict(line.split() for line in table.splitlines())
    cached = sum(
        int(parts.get(name, 0)) for name in ("active_file", "inactive_file")
    )  # the system frees it when needed
    return [] if limit.strip() == "max" else [int(limit) - int(used) + cached]


def peak_bytes() -> int:
    """The most memory of this process since `reset_peak`, or since its start; 0 if the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return _peak_of_its_life()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _peak_of_its_life() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def reset_peak() -> None:
    """Count the peak anew, if the system allows it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def bytes_of(text: str, name: str = "memory_limit") -> int:
    """The number of bytes in a text like `2GiB`, `1.5 GB` or `800MiB`."""
    parsed = re.fullmatch(r"\s*(\d+\.?\d*)\s*([a-z]*)\s*", text.lower(), re.ASCII)
    size = float(parsed[1]) * UNITS.get(parsed[2], 0) if parsed else 0.0
    if not 1 <= size < 2**63:
        raise UsageError(f"{name}={text!r} is no amount of memory; write 800MiB, 2GiB or 2GB")
    return int(size)
