"""From a portable graph to the graph of an engine, one file for each backend.

prepare(model) -> bool    rewrites a copy of the portable graph in place for the backend; returns whether it changed
"""

__all__ = ["TARGETS", "engine_folder"]

TARGETS = {"ort": "tilewright.export.targets.ort"}


def engine_folder(component: str, backend: str, precision: str) -> str:
    """The folder in a bundle for the files of one engine."""
    return f"engines/{component}.{backend}-{precision}"
