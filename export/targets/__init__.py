"""A portable graph to an engine: one file each.

prepare(model) -> bool    rewrite a copy of the portable graph, in place, into the form the backend runs best;
                          whether anything changed
"""

__all__ = ["TARGETS", "engine_folder"]

TARGETS = {"ort": "tilewright.export.targets.ort"}


def engine_folder(component: str, backend: str, precision: str) -> str:
    """The folder of a bundle for the files of one engine."""
    return f"engines/{component}.{backend}-{precision}"
