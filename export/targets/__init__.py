"""From a portable graph to an engine, one file for each backend.

prepare(model) -> bool       rewrites a copy of the portable graph in place for the backend; returns whether it changed
spec(name, graph) -> spec    the description of the engine of that name with this graph
"""

__all__ = ["TARGETS", "engine_folder"]

TARGETS = {"ort-float32": "tilewright.export.targets.ort"}  # name of the engine -> its module


def engine_folder(component: str, engine: str) -> str:
    """The folder in a bundle for the files of one engine."""
    return f"engines/{component}.{engine}"
