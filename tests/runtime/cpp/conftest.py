"""The C++ library is compiled once for all tests of it."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from support.shared import Shared
from support.tensorrt.bindings import HERE, compiled_driver

ROOT = Path(__file__).parents[3]
Run = Callable[..., subprocess.CompletedProcess[str]]
OPTIONS = {"OPENVINO": "openvino", "AOTI": "torch"}  # of the build -> the package that it needs
SANITIZE = os.environ.get("TILEWRIGHT_SANITIZE", "")  # see make cpp-sanitize


def builds_with(package: str) -> bool:
    """Whether the library is built with a package. Its libraries have no sanitizers."""
    return importlib.util.find_spec(package) is not None and not SANITIZE


def imitated_tensorrt(root: Path) -> Path:
    """A folder like that of TensorRT, with an imitation of it."""
    source = Path(__file__).parent / "tensorrt"
    if not root.is_dir():
        (root / "lib").mkdir(parents=True)
        (root / "include").symlink_to(source)
    words = ["g++", "-O1", "-shared", "-fPIC", "-Wl,-soname,libnvinfer.so", f"-I{source}", source / "imitation.cpp"]
    subprocess.run([*words, "-o", root / "lib" / "libnvinfer.so"], check=True)
    return root


def skip_without_thread_sanitizer(shared: Shared) -> None:
    """Some kernels place memory where ThreadSanitizer does not expect it, and then it runs nothing."""

    def compile_into(folder: Path) -> None:
        folder.mkdir()
        words = ["g++", "-fsanitize=thread", "-x", "c++", "-", "-o", folder / "empty"]
        subprocess.run(words, input="int main() {}", text=True, check=True)

    ended = subprocess.run([shared("thread-sanitizer", compile_into) / "empty"], capture_output=True, text=True)
    if ended.returncode:
        pytest.skip(f"ThreadSanitizer does not run on this kernel: {ended.stderr.strip()}")


@pytest.fixture(scope="session")
def cmake() -> str:
    """The path of CMake."""
    path = shutil.which("cmake", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not path or not shutil.which("g++"):
        pytest.skip("needs CMake and g++")
    return path


@pytest.fixture(scope="session")
def built(shared: Shared, cmake: str) -> Path:
    """The folder of a build, with the programs of these tests."""
    headers = os.environ.get("ONNXRUNTIME_ROOT") or (ROOT / "build" / "onnxruntime" / "include").is_dir()
    if not headers:
        pytest.skip("needs ONNX Runtime's headers: make cpp fetches them")

    def compile_into(folder: Path) -> None:
        options = [
            "-DCMAKE_BUILD_TYPE=Debug",
            f"-DCMAKE_CXX_FLAGS_DEBUG=-O{1 if SANITIZE else 0}",
            "-DCMAKE_UNITY_BUILD=ON",  # half the time of the compiler
            f"-DTILEWRIGHT_TESTS={Path(__file__).parent}",
            *(f"-DTILEWRIGHT_{option}={'ON' if builds_with(name) else 'OFF'}" for option, name in OPTIONS.items()),
            f"-DTILEWRIGHT_SANITIZE={SANITIZE}",
            "-DTILEWRIGHT_TENSORRT=ON",
            f"-DTensorRT_ROOT={imitated_tensorrt(folder / 'imitation')}",
        ]
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        configure = [
            cmake,
            "-S",
            ROOT / "runtime" / "cpp",
            "-B",
            folder,
            *generator,
            *options,
            f"-DTILEWRIGHT_PYTHON={sys.executable}",
        ]
        for command in (configure, [cmake, "--build", folder]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "warning:" not in done.stdout + done.stderr

    if SANITIZE == "thread":
        skip_without_thread_sanitizer(shared)
    if kept := os.environ.get("TILEWRIGHT_CPP_BUILD"):  # compiles only what changed since the last run
        compile_into(Path(kept))
        return Path(kept)
    return shared("cpp", compile_into)


@pytest.fixture(scope="session")
def prefix(built: Path, cmake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed folder, at another place than that of its installation."""
    folder = tmp_path_factory.mktemp("prefix")
    done = subprocess.run([cmake, "--install", built, "--prefix", folder / "first"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return (folder / "first").rename(folder / "moved")


@pytest.fixture(autouse=True)
def _suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    """ThreadSanitizer says nothing of libraries that are built without it."""
    if SANITIZE == "thread":
        monkeypatch.setenv("TSAN_OPTIONS", f"suppressions={Path(__file__).parent / 'tsan.supp'}")


@pytest.fixture
def imitated_gpu(shared: Shared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's driver is one of tests, for a GPU with compute capability 9.0 whose memory is the host's."""
    folder = tmp_path / "driver"
    folder.mkdir()
    (folder / "libcuda.so.1").symlink_to(compiled_driver(HERE / "driver.c", shared))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))


@pytest.fixture
def run(built) -> Run:
    """Run a program of the build, without our native kernels."""

    def run(name: str, *words: object) -> subprocess.CompletedProcess[str]:
        environment = {"TILEWRIGHT_NATIVE": "", **os.environ}
        return subprocess.run([built / name, *map(str, words)], capture_output=True, text=True, env=environment)

    return run
