"""Errors a user can act on, and the exit code each one ends a command with.

Messages name options as the command line spells them: what is --max-pixels there is max_pixels in Python.
"""

from typing import Any

__all__ = [
    "AccuracyError",
    "BuildError",
    "BundleError",
    "EnvironmentMismatch",
    "InputError",
    "ResourceError",
    "TilewrightError",
    "UsageError",
]


class TilewrightError(Exception):
    """One line: what is wrong, the value, what to do next."""

    exit_code = 1
    report: dict[str, Any] | None = None  # what was measured before it failed, for --json


class UsageError(TilewrightError):
    """An argument that cannot be meant."""

    exit_code = 2


class BundleError(TilewrightError):
    """A bundle that is damaged, foreign or newer than this reader."""

    exit_code = 3


class EnvironmentMismatch(TilewrightError):
    """A package, driver or device that the work needs is missing or does not fit."""

    exit_code = 4


class ResourceError(TilewrightError):
    """Too little memory or disk, found before the work starts."""

    exit_code = 5


class BuildError(TilewrightError):
    """A stage of a build that failed."""

    exit_code = 6


class AccuracyError(TilewrightError):
    """An engine that differs from eager PyTorch by more than the gate allows, or gives numbers that are not finite."""

    exit_code = 7


class InputError(TilewrightError):
    """An image or a weights file that cannot be used."""

    exit_code = 8
