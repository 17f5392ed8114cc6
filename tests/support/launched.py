"""Which kernels a call runs: a test that takes the plain path by mistake would compare PyTorch with PyTorch."""

from collections.abc import Callable
from typing import Any
from unittest import mock

from tilewright.kernels.jit import Launch


def launched(call: Callable[..., Any], *arguments: Any, **attributes: Any) -> tuple[Any, list[str]]:
    """What the call gives, and the names of the kernels that it has run, in order."""
    names, run = [], Launch.__call__

    def noted(launch: Launch) -> None:
        run(launch)
        names.append(launch.kernel.__name__)

    with mock.patch.object(Launch, "__call__", noted):
        return call(*arguments, **attributes), names
