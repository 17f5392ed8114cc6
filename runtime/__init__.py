"""Restoring images with a bundle. It needs NumPy, Pillow and an engine, and never PyTorch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tilewright.runtime.errors import TilewrightError
    from tilewright.runtime.images.write import encode_image, write_image
    from tilewright.runtime.native import NativeRestorer, load_native
    from tilewright.runtime.restore import Restorer, load
    from tilewright.runtime.sitting import Restoration

    __version__: str

__all__ = [
    "NativeRestorer",
    "Restoration",
    "Restorer",
    "TilewrightError",
    "__version__",
    "encode_image",
    "load",
    "load_native",
    "write_image",
]

_HOMES = {
    "TilewrightError": "errors",
    "Restoration": "sitting",
    **dict.fromkeys(("Restorer", "load"), "restore"),
    **dict.fromkeys(("NativeRestorer", "load_native"), "native"),
    **dict.fromkeys(("encode_image", "write_image"), "images.write"),
}


def __getattr__(name: str) -> Any:
    """Import a name on its first use, so that a command that only prints its help does not load NumPy."""
    if name == "__version__":
        from importlib.metadata import version

        return version("tilewright")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
