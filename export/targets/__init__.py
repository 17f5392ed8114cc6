"""A portable graph to an engine: one file each.

prepare(model) -> bool    rewrite a copy of the portable graph, in place, into the form the backend runs best;
                          whether anything changed
"""

__all__ = ["TARGETS"]

TARGETS = {"ort": "tilewright.export.targets.ort"}
