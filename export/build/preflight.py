"""Checking a request by names, headers and sizes, before anything is traced or written."""

import shutil
from pathlib import Path

from tilewright.export.build.attachment import check_attachment
from tilewright.export.build.forecast import Forecast
from tilewright.export.build.request import Request
from tilewright.export.build.stages.constants import check_constants
from tilewright.runtime.bundle.arguments import check_arguments
from tilewright.runtime.bundle.write import check_replaceable
from tilewright.runtime.errors import BundleError, ResourceError, UsageError, amount
from tilewright.runtime.memory.machine import available_bytes

__all__ = ["check_request", "check_room", "free_room"]


def check_request(request: Request) -> None:
    """Refuse an output that is not a bundle, and files that do not fit the system."""
    check_replaceable(request.out)
    check_attachment(request)
    check_constants(request)
    try:
        check_arguments(request.program)
    except BundleError as error:
        raise UsageError(f"{request.name}: {error}") from None


def check_room(forecast: Forecast) -> None:
    """Refuse a build that does not fit on the disks or in memory."""
    needed: dict[int, int] = {}
    for place, size in forecast.disk.items():  # places on one disk are added up
        needed[_existing(place).stat().st_dev] = needed.get(_existing(place).stat().st_dev, 0) + size
    for place in forecast.disk:
        size, free = needed[_existing(place).stat().st_dev], shutil.disk_usage(_existing(place)).free
        if size > free:
            raise ResourceError(f"{place}: needs {amount(size)}, {amount(free)} are free; make room")
    free_memory = available_bytes()
    if free_memory is not None and forecast.memory > free_memory:
        raise ResourceError(
            f"stages {', '.join(forecast.stages)} need about {forecast.memory / 2**30:.1f} GiB of memory,"
            f" {free_memory / 2**30:.1f} GiB are free; use --verify never, or a larger machine"
        )


def free_room(forecast: Forecast) -> tuple[dict[Path, int], int | None]:
    """The bytes that are free in each place of a forecast, and in memory."""
    return {place: shutil.disk_usage(_existing(place)).free for place in forecast.disk}, available_bytes()


def _existing(path: Path) -> Path:
    return next(p for p in (path.resolve(), *path.resolve().parents) if p.exists())
