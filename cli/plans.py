"""Options and forecasts of TensorRT's plans, for the verbs that build bundles and add engines to them."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilewright.export.build.request import Request
    from tilewright.export.plans.build import Options
    from tilewright.export.plans.forecast import PlanForecast
    from tilewright.runtime.errors import ResourceError

__all__ = ["add_plan_options", "forecast_of_plans", "plan_options"]

MOST_TILES = 32  # in one call


def add_plan_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of plans."""
    group = parser.add_argument_group("plans of TensorRT")
    group.add_argument(
        "--tile", type=sides, default=(), metavar="PX,...", help="sides of tiles, one profile each (default: its own)"
    )
    group.add_argument("--batch", type=int, metavar="N", help="most tiles in a call (default: the bundle's)")
    group.add_argument(
        "--stream-weights", action="store_true", help="let '--memory low' keep weights in the host's memory"
    )
    group.add_argument(
        "--timing-cache", type=Path, metavar="FILE", help="what was measured of kernels (default: that of this GPU)"
    )


def sides(text: str) -> tuple[int, ...]:
    return tuple(int(side) for side in text.split(","))


def plan_options(arguments: argparse.Namespace) -> "Options":
    """The options of plans that the user set."""
    from tilewright.export.plans.build import Options
    from tilewright.runtime.inputs import whole

    batch = None if arguments.batch is None else whole("batch", arguments.batch, 1, MOST_TILES)
    return Options(arguments.tile, batch, arguments.stream_weights, timings=arguments.timing_cache)


def forecast_of_plans(
    request: "Request", precisions: Sequence[str], gpu: str | None
) -> "tuple[PlanForecast, ResourceError | None]":
    """What compiling plans takes, and the fault if it is too much; without a name, on the GPU that is here."""
    from tilewright.export.build.parameters import count
    from tilewright.export.plans.forecast import check_gpu, gpu_bytes, plan_forecast
    from tilewright.runtime.errors import ResourceError

    sizes = {name: count({name: request.parameters[name]}) for name in request.components}
    named, memory = (gpu, gpu_bytes(gpu)) if gpu else _gpu_here()
    predicted = plan_forecast(named, memory, sizes, precisions)
    try:
        check_gpu(predicted)
    except ResourceError as error:
        return predicted, error
    return predicted, None


def _gpu_here() -> tuple[str, int]:
    """The architecture and the memory of this machine's GPU."""
    from tilewright.runtime.engines.driver import first_gpu
    from tilewright.runtime.engines.machine import compute_capability

    major, minor = compute_capability() or (0, 0)
    return f"sm{major}{minor}", first_gpu().memory()[1]
