"""Options of TensorRT's plans, and forecasts of compiled engines, for the verbs that build them."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.export.build.request import Request
    from tilewright.export.plans.build import Options
    from tilewright.export.plans.forecast import CompiledForecast
    from tilewright.runtime.errors import ResourceError

__all__ = ["add_plan_options", "batches", "forecasts", "plan_options"]

MOST_TILES = 32  # in one call


def add_plan_options(parser: argparse.ArgumentParser, *, builds: bool = False) -> None:
    """Add the options of tiles, which a build writes into the bundle's program, and those of plans."""
    group = parser.add_argument_group("tiles, and plans of TensorRT")
    own = ("; the first is the bundle's", "; the most is the bundle's") if builds else ("", "")
    default = "the system's" if builds else "the bundle's"
    group.add_argument(
        "--tile",
        type=numbers,
        default=(),
        metavar="PX,...",
        help=f"sides of tiles, one profile each{own[0]} (default: {default})",
    )
    group.add_argument(
        "--batch",
        type=numbers,
        default=(),
        metavar="N,...",
        help=f"numbers of tiles in a call, one profile each{own[1]} (default: {default})",
    )
    group.add_argument(
        "--stream-weights", action="store_true", help="let '--memory low' keep weights in the host's memory"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="what was measured of kernels (default: that of this GPU)"
    )


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(","))


def batches(arguments: argparse.Namespace) -> tuple[int, ...]:
    """The numbers of tiles in a call that the user set."""
    from tilewright.runtime.inputs import whole

    return tuple(whole("batch", number, 1, MOST_TILES) for number in arguments.batch)


def plan_options(arguments: argparse.Namespace) -> "Options":
    """The options of plans that the user set."""
    from tilewright.export.plans.build import Options

    return Options(arguments.tile, batches(arguments), arguments.stream_weights, timings=arguments.timing_cache)


def forecasts(
    request: "Request", engines: Mapping[str, Sequence[str]], gpu: str | None
) -> "tuple[list[CompiledForecast], list[ResourceError]]":
    """What compiled engines take, by target and precisions, and what is too much. No name: the GPU here, if any."""
    from tilewright.export.build.parameters import count
    from tilewright.export.plans.forecast import (
        check_gpu,
        gpu_bytes,
        graph_forecast,
        package_forecast,
        plan_forecast,
    )
    from tilewright.runtime.engines.machine import compute_capability
    from tilewright.runtime.errors import ResourceError

    sizes = {name: count({name: request.parameters[name]}) for name in request.components}
    named, memory = (gpu, gpu_bytes(gpu)) if gpu else _gpu_here() if compute_capability() else (None, None)
    predicted, faults = [], []
    for target, precisions in engines.items():
        if target == "tensorrt":
            predicted.append(plan_forecast(str(named), memory or 0, sizes, precisions))
        else:
            predict = package_forecast if target == "aoti" else graph_forecast
            predicted.append(predict(named, memory, sizes, precisions))
        try:
            check_gpu(predicted[-1])
        except ResourceError as error:
            faults.append(error)
    return predicted, faults


def _gpu_here() -> tuple[str, int]:
    """The architecture and the memory of this machine's GPU."""
    from tilewright.runtime.engines.driver import first_gpu
    from tilewright.runtime.engines.machine import compute_capability

    major, minor = compute_capability() or (0, 0)
    return f"sm{major}{minor}", first_gpu().memory()[1]
