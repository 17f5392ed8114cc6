"""`tilewright export build --dry-run`: the stages, disk, memory and time of a build, and of its compiled engines."""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tilewright.cli.plans import forecasts
from tilewright.cli.terminal import answer, span
from tilewright.runtime.errors import ResourceError, amount

if TYPE_CHECKING:
    from tilewright.export.build.forecast import Forecast
    from tilewright.export.build.request import Request

__all__ = ["dry_run"]


def dry_run(
    arguments: argparse.Namespace, request: "Request", explained: dict[str, Any], compiled: Mapping[str, Sequence[str]]
) -> None:
    """Predict a build, and its compiled engines by target and precisions."""
    from tilewright.export.build.forecast import forecast
    from tilewright.export.build.preflight import check_request, check_room, free_room
    from tilewright.export.build.run import up_to_date
    from tilewright.export.build.stage_list import list_stages, quick_digest

    check_request(request)
    stages = list_stages(request, quick_digest)
    predicted = forecast(request, stages, up_to_date=up_to_date(request, stages))
    free_disk, free_memory = free_room(predicted)
    free = {"free_disk": {str(place): n for place, n in free_disk.items()}, "free_memory_bytes": free_memory}
    fault = None
    try:
        check_room(predicted)
    except ResourceError as error:
        fault = error
    disk = [f"{amount(n)} under {place}, {amount(free_disk[place])} free" for place, n in predicted.disk.items()]
    memory = "unknown" if free_memory is None else amount(free_memory)
    lines = [
        f"stages: {', '.join(predicted.stages) or 'none, the bundle is up to date'}",
        f"disk: {'; '.join(disk) or 'nothing'}",
        f"peak memory: {amount(predicted.memory)}, {memory} free",
        f"time: {_time(predicted)}",
    ]
    report = predicted.to_json() | free | explained
    if compiled:
        compiling, too_much = forecasts(request, compiled, arguments.gpu)
        report |= {each.made: each.to_json() for each in compiling}
        lines += [line for each in compiling for line in each.lines()]
        faults = [*filter(None, [fault]), *too_much]
        fault = ResourceError("; ".join(map(str, faults))) if len(faults) > 1 else next(iter(faults), None)
    answer(arguments, report, "\n".join(lines), fault=fault)


def _time(predicted: "Forecast") -> str:
    unknown = [name for name in predicted.stages if name not in predicted.seconds]
    if predicted.stages == unknown:
        return "unknown, no build of this size has run here" if unknown else "none"
    without = f", without {', '.join(unknown)}" if unknown else ""
    return f"about {span(sum(predicted.seconds.values()))} by earlier builds here{without}"
