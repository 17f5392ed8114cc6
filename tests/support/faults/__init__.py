"""All faults to plant, each with the rule that must find it, the place, and a part of the text."""

from support.faults import graphs, quantized, restrictions  # noqa: F401 each adds its faults
from support.planted import FAULTS

__all__ = ["FAULTS"]
