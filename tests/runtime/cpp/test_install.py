"""What `cmake --install` writes, moved to another folder and used as an engineer would use it."""

import io
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image

from support.pages import ROOT, page
from support.scenes import scene
from support.served import png_of
from tilewright.runtime import load

pytestmark = pytest.mark.slow

IMAGE = scene(24, 40)
MAIN = """
#include <tilewright.h>
int main(void) { return tw_open(0, 0) || tw_last_status() != TW_USAGE; }
"""


def run(*words: object, **options: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning:" not in done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def says(prefix: Path, cmake: str, bundle: Path, tmp_path: Path):
    """Run the commands of the page that begin so, with the folders of this test."""
    places = {
        "/opt/tilewright": prefix,
        "out/hitoksr-demo": bundle,
        "build/": f"{tmp_path}/",
        "examples/": f"{ROOT}/examples/",
    }

    def says(*begins: str) -> None:
        for begin in begins:
            (line,) = (line for line in page("cpp").splitlines() if line.startswith(begin))
            for name, place in places.items():
                line = line.replace(name, str(place))
            path = f"{Path(cmake).parent}{os.pathsep}{os.environ['PATH']}"
            generator = {"CMAKE_GENERATOR": "Ninja"} if shutil.which("ninja") else {}
            run("sh", "-ec", line, cwd=tmp_path, env=os.environ | {"PATH": path} | generator)

    return says


@pytest.fixture
def restored(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    monkeypatch.setenv("TILEWRIGHT_NATIVE", "")
    with load(bundle) as restorer:
        return restorer(IMAGE)


def test_the_files_are_where_packages_look_for_them(prefix: Path) -> None:
    files = {file.relative_to(prefix).as_posix() for file in prefix.rglob("*") if not file.is_dir()}
    assert {"include/tilewright.h", "include/tilewright.hpp", "bin/tilewright-restore"} <= files
    assert {"lib/libtilewright.so", "lib/libtilewright.so.0", "lib/libtilewright.a"} <= files
    assert {"lib/pkgconfig/tilewright.pc", "lib/cmake/Tilewright/TilewrightConfigVersion.cmake"} <= files
    assert not [name for name in files if "vectors" in name or "misuse" in name]


@pytest.mark.skipif(not shutil.which("readelf"), reason="no readelf here")
@pytest.mark.parametrize(
    ("file", "place"), [("lib/libtilewright.so", "$ORIGIN"), ("bin/tilewright-restore", "$ORIGIN/../lib")]
)
def test_libraries_are_found_from_where_the_file_lies(prefix: Path, file: str, place: str) -> None:
    listed = run("readelf", "-d", prefix / file)
    (places,) = re.findall(r"(?:RPATH|RUNPATH).*\[(.*)\]", listed)
    assert places.split(":")[0] == place  # OpenVINO's folder may follow
    assert "libonnxruntime.so.1" in listed or file.startswith("bin")


def test_the_minimal_example_restores_with_the_installed_package(says, restored, tmp_path) -> None:
    assert len((ROOT / "examples" / "cpp_minimal" / "CMakeLists.txt").read_text().splitlines()) <= 20
    Image.fromarray(IMAGE).save(tmp_path / "in.ppm")
    says("cmake -S examples/cpp_minimal", "cmake --build build/minimal", "build/minimal/minimal")
    difference = np.abs(np.asarray(Image.open(tmp_path / "out.ppm")).astype(int) - restored)
    assert difference.max() <= 1 and (difference == 0).mean() >= 0.999


def test_a_version_that_is_not_here_is_refused(prefix: Path, cmake: str, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(other LANGUAGES CXX)\nfind_package(Tilewright 0.9 REQUIRED)\n"
    )
    words = [cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode != 0
    assert 'compatible with requested version "0.9"' in " ".join(done.stderr.split())


@pytest.mark.skipif(not shutil.which("pkg-config"), reason="no pkg-config here")
def test_a_program_in_c_is_linked_by_pkg_config(
    says, prefix: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    monkeypatch.setenv("PKG_CONFIG_PATH", str(prefix / "lib" / "pkgconfig"))
    says("cc main.c")
    run(tmp_path / "main")
    assert f"{prefix}/lib/libtilewright.so.0" in run("ldd", tmp_path / "main")


def test_a_program_in_c_is_linked_with_the_static_library(prefix: Path, cmake: str, tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text(MAIN)
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(main LANGUAGES C CXX)\nfind_package(Tilewright REQUIRED)\n"
        "add_executable(main main.c)\ntarget_link_libraries(main PRIVATE Tilewright::tilewright_static)\n"
        "set_target_properties(main PROPERTIES C_STANDARD 17 LINKER_LANGUAGE CXX)\n"
        "target_compile_options(main PRIVATE -Wall -Wextra -pedantic -Werror)\n"
    )
    run(cmake, "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", tmp_path / "build")
    run(tmp_path / "build" / "main")
    assert "libtilewright" not in run("ldd", tmp_path / "build" / "main")


def test_the_header_for_cpp_has_no_warnings(prefix: Path) -> None:
    header = prefix / "include" / "tilewright.hpp"
    strict = ("-std=c++17", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror")
    run("c++", *strict, "-fsyntax-only", "-x", "c++", "-include", header, f"-I{header.parent}", os.devnull)


def test_the_service_answers_with_the_restored_picture(says, bundle, restored, tmp_path) -> None:
    if subprocess.run(["pkg-config", "--exists", "cpp-httplib"], capture_output=True).returncode:
        pytest.skip("needs cpp-httplib: apt install libcpp-httplib-dev")
    says("cmake -S examples/cpp_service", "cmake --build build/service")
    with subprocess.Popen(
        [tmp_path / "service" / "service", bundle, "0"], stdout=subprocess.PIPE, text=True
    ) as service:
        try:
            address = service.stdout.readline().split()[-1]
            told = httpx2.get(address, timeout=60)
            assert told.status_code == 200 and "sharpen" in told.text
            answer = httpx2.post(address, content=png_of(IMAGE), timeout=60)
            assert answer.headers["content-type"] == "image/png"
            answered = np.asarray(Image.open(io.BytesIO(answer.content)))
            assert np.abs(answered.astype(int) - restored).max() <= 1
            large = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)
            as_curl = {"content-type": "application/x-www-form-urlencoded"}
            assert httpx2.post(address, content=png_of(large), headers=as_curl, timeout=60).status_code == 200
            refused = httpx2.post(address, content=b"no picture", timeout=60)
            assert refused.status_code == 422 and "no PNG" in refused.text
        finally:
            service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
