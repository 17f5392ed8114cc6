"""trace: graphs without weights. A graph is cached by its recipe, so that systems share it."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tilewright.export.build.cache import Stage, filling
from tilewright.export.build.code import code
from tilewright.export.build.request import Request
from tilewright.export.build.versions import TRACERS, versions
from tilewright.export.system import ComponentSpec
from tilewright.runtime.errors import BuildError, TilewrightError

__all__ = ["stage", "traced"]


def stage(request: Request) -> Stage:
    """The stage; its inputs are the recipe and the code of every network, and the versions of what traces it."""
    graphs = {f"graph {name}": _graph(spec) for name, spec in request.components.items()}
    inputs = {name: value for graph in graphs.values() for name, value in graph.inputs.items() if name != "recipe"}
    inputs |= {name: graph.key for name, graph in graphs.items()} | code(__name__)
    return Stage("trace", inputs, lambda folder: _work(request, folder))


def _graph(spec: ComponentSpec) -> Stage:
    inputs = {"recipe": spec.recipe} | code("tilewright.export.graph.trace", spec.module) | versions(*TRACERS)
    return Stage("graph", inputs, lambda folder: _trace(spec, folder))


def _work(request: Request, directory: Path) -> None:
    for name, spec in request.components.items():
        shutil.copyfile(traced(f"{request.name}.{name}", spec), directory / f"{name}.onnx")


def traced(what: str, spec: ComponentSpec) -> Path:
    """The graph of a component in the cache, which is traced if it is not there. `what` begins complaints."""
    graph = _graph(spec)
    with filling(graph.directory) as folder:
        if folder:
            _explained(what, partial(graph.work, folder))
    return graph.directory / "traced.onnx"


def _explained(what: str, work: Callable[[], None]) -> None:
    try:
        work()
    except TilewrightError:
        raise
    except Exception as error:  # torch.export and the exporter raise errors of any type
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BuildError(f"trace of {what} failed ({reason}); see --verbose") from error


def _trace(spec: ComponentSpec, directory: Path) -> None:
    import onnx_ir as ir

    from tilewright.export.graph.trace import trace

    ir.save(trace(spec), directory / "traced.onnx")
