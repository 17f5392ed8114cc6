"""What workers answer, or why they do not."""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from tilewright.runtime.errors import DeviceError, EnvironmentMismatch, ResourceError

__all__ = ["LostWorker", "answers_of", "last_line"]

BEGINS_S = 120.0  # a machine starts a process within so many seconds, unless it has no free cores


class LostWorker(DeviceError):
    """The process of a worker has ended, or its machine does not answer."""


def answers_of(ray: ModuleType, asked: Mapping[str, Any], *, begins: bool = False) -> dict[str, Any]:
    """What workers answer. Their errors are raised as they are; a lost machine is a LostWorker."""
    answers = {}
    for name, reference in asked.items():
        try:
            answers[name] = ray.get(reference, timeout=BEGINS_S if begins else None)
        except ray.exceptions.GetTimeoutError:
            raise ResourceError(
                f"{name} started no process within {BEGINS_S:.0f} s; 'ray status' tells whether its cores are taken"
            ) from None
        except ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else DeviceError(_first_line(error))) from None
        except ray.exceptions.RayError as error:
            if begins:
                raise EnvironmentMismatch(
                    f"{name} cannot start a process ({last_line(error)}); install tilewright there, with"
                    f" Ray {ray.__version__}"
                ) from None
            raise LostWorker(f"{name} is lost ({type(error).__name__})") from None
    return answers


def last_line(error: BaseException) -> str:
    """The last line of a message of Ray, which has the cause."""
    return str(error).strip().rpartition("\n")[2]


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
