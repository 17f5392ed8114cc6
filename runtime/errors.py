"""Errors that a user can act on, with the exit code of each.

Messages name arguments as Python does, max_pixels=64; the command line shows them as its options, --max-pixels 64.
"""

from typing import Any

__all__ = [
    "AccuracyError",
    "BuildError",
    "BundleError",
    "DeviceError",
    "EnvironmentMismatch",
    "InputError",
    "ResourceError",
    "TilewrightError",
    "UsageError",
    "amount",
]


def amount(number: float) -> str:
    """A number of bytes with a fitting unit."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= factor:
            return f"{number / factor:.1f} {unit}"
    return f"{number:.0f} bytes"


class TilewrightError(Exception):
    """An error with a message of one line: what is wrong, the value, what to do next."""

    exit_code = 1
    report: dict[str, Any] | None = None  # results from before the failure, for --json
    picture: Any = None  # where a picture is that could not be written where it should be
    repeat: tuple[str, ...] = ()  # commands that repeat the failure without Tilewright
    kept: Any = None  # where a restoration that it stopped keeps its finished parts, see `Ticket.keeping`


class UsageError(TilewrightError):
    """A wrong argument."""

    exit_code = 2


class BundleError(TilewrightError):
    """A bundle that is damaged, or newer than this version, or not a bundle."""

    exit_code = 3


class EnvironmentMismatch(TilewrightError):
    """A missing package, driver or device, or one that does not fit."""

    exit_code = 4


class ResourceError(TilewrightError):
    """Too little memory or disk."""

    exit_code = 5


class BuildError(TilewrightError):
    """A failed stage of a build."""

    exit_code = 6


class AccuracyError(TilewrightError):
    """An engine that differs too much from eager PyTorch, or gives numbers that are not finite."""

    exit_code = 7


class DeviceError(TilewrightError):
    """A device that hangs or is lost, while no other device is left."""

    exit_code = 9


class InputError(TilewrightError):
    """An image or a weights file that cannot be used."""

    exit_code = 8
