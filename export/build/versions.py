"""The versions of the packages that results depend on."""

import functools
import importlib.metadata

__all__ = ["TRACERS", "version", "versions"]

TRACERS = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir", "onnx")


def versions(*packages: str) -> dict[str, str]:
    """The versions of these packages, for the key of a stage."""
    return {f"version {package}": version(package) for package in packages}


@functools.cache
def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
