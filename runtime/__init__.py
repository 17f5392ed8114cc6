"""A bundle in, pixels out. Needs NumPy, Pillow and an engine; never PyTorch."""

from tilewright.runtime.errors import TilewrightError
from tilewright.runtime.restore import Restoration, Restorer, load

__all__ = ["Restoration", "Restorer", "TilewrightError", "load"]
