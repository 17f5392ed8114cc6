"""TensorRT's real Python bindings over a library that tests compile; no TensorRT and no GPU is needed.

The bindings of the newer version may be installed; those of the older one are downloaded once, 1 MB each.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

__all__ = ["HERE", "VERSIONS", "place_with"]

VERSIONS = ("10.16.1.11", "11.4.0.106")
HERE = Path(__file__).parent
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def place_with(version: str, library: Path, config: pytest.Config, place: Path) -> Path:
    """Fill a folder with a module `tensorrt` of this version; the file `library` is compiled as all its libraries."""
    compiler = shutil.which("g++") or pytest.skip("no g++ for the libraries that TensorRT's bindings look for")
    with zipfile.ZipFile(_wheel(version, config)) as file:
        file.extractall(place)
    (place / "tensorrt").symlink_to("tensorrt_bindings")
    compiled = place / "libstub.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", library, "-o", compiled], check=True)
    for name in LIBRARIES:
        (place / "tensorrt_bindings" / f"lib{name}.so.{version.split('.')[0]}").symlink_to(compiled)
    return place


def _wheel(version: str, config: pytest.Config) -> Path:
    wheels = Path(config.cache.mkdir("tensorrt_bindings"))  # type: ignore[union-attr]
    pattern = f"*-{version}-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    if not any(wheels.glob(pattern)):
        words = ["pip", "download", "-q", "--no-deps", "-d", wheels, f"tensorrt_cu13_bindings=={version}"]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"TensorRT's bindings {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    return next(wheels.glob(pattern))
