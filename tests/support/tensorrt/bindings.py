"""TensorRT's real Python bindings over a library that tests compile; no TensorRT and no GPU is needed.

The bindings of the newer version may be installed; those of the older one are downloaded once, 1 MB each.
"""

import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from support.shared import Shared

__all__ = ["HERE", "VERSIONS", "compiled_driver", "place_with"]

VERSIONS = ("10.16.1.11", "11.4.0.106")
HERE = Path(__file__).parent
PACKAGE, MODULE = "tensorrt_cu13_bindings", "tensorrt_bindings"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")


def place_with(version: str, library: Path, config: pytest.Config, place: Path, shared: Shared) -> Path:
    """Fill a folder with a module `tensorrt` of this version; the file `library` is compiled as all its libraries."""
    if not _installed(version):
        with zipfile.ZipFile(_wheel(version, config)) as file:
            file.extractall(place)
    else:
        shutil.copytree(Path(str(metadata.distribution(PACKAGE).locate_file("tensorrt_bindings"))), place / MODULE)
    (place / "tensorrt").symlink_to(MODULE)
    told = place / f"tensorrt-{version}.dist-info" / "METADATA"
    told.parent.mkdir()
    told.write_text(f"Metadata-Version: 2.1\nName: tensorrt\nVersion: {version}\n")
    (place / "libstub.so").symlink_to(_compiled(library, shared, "g++", "-O1"))
    for name in LIBRARIES:
        (place / MODULE / f"lib{name}.so.{version.split('.')[0]}").symlink_to((place / "libstub.so").resolve())
    return place


def compiled_driver(source: Path, shared: Shared) -> Path:
    """The driver of a GPU that is not there, compiled with NVIDIA's header, which comes with Triton."""
    triton = pytest.importorskip("triton", reason="Triton is not installed, and cuda.h comes with it")
    header = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    return _compiled(source, shared, "gcc", "-O1", f"-I{header}")


def _compiled(source: Path, shared: Shared, compiler: str, *options: str) -> Path:
    """A library of one source, compiled once a run."""
    if not shutil.which(compiler):
        pytest.skip(f"no {compiler} for the libraries that TensorRT's bindings look for")

    def compile_it(folder: Path) -> None:
        folder.mkdir()
        subprocess.run([compiler, *options, "-shared", "-fPIC", source, "-o", folder / "library.so"], check=True)

    return shared(f"tensorrt-{source.stem}", compile_it) / "library.so"


def _installed(version: str) -> bool:
    try:
        return metadata.version(PACKAGE) == version
    except metadata.PackageNotFoundError:
        return False


def _wheel(version: str, config: pytest.Config) -> Path:
    wheels = Path(config.cache.mkdir("tensorrt_bindings"))  # type: ignore[union-attr]
    pattern = f"*-{version}-cp{sys.version_info[0]}{sys.version_info[1]}-*.whl"
    if not any(wheels.glob(pattern)):
        words = ["pip", "download", "-q", "--no-deps", "-d", wheels, f"tensorrt_cu13_bindings=={version}"]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=60)
        if done.returncode:
            pytest.skip(f"TensorRT's bindings {version} cannot be downloaded: {done.stderr.strip()[-200:]}")
    return next(wheels.glob(pattern))
