"""TensorRT 10.16 and 11.4, as their real Python bindings take it; each version has a process of its own.

Names, arguments, types and the order of calls are checked, and that weights, shapes and memory reach their places.
Not covered, because only TensorRT on a GPU does it: whether a graph compiles, how exact it is, and how fast.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.tensorrt.bindings import HERE, VERSIONS, compiled_driver, place_with

CASES = HERE / "cases.py"


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_cases_pass_with_the_bindings(version, shared, request, tmp_path):
    run_cases(version, shared, request.config, tmp_path / "tensorrt")


@pytest.mark.slow
def test_a_real_network_compiles(hitoksr_tiny, cache, shared, request, tmp_path):
    real = {"STUB_BUNDLE": str(hitoksr_tiny), "STUB_CACHE": str(cache)}
    run_cases(VERSIONS[-1], shared, request.config, tmp_path / "tensorrt", "-k", "real or any_machine", **real)


def run_cases(version, shared, config, folder, *words, **variables):
    place = place_with(version, HERE / "library.cpp", config, folder, shared)
    environment = (
        os.environ
        | variables
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(place), os.environ.get("PYTHONPATH")])),
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # they take longer to load than the cases to run
            "STUB_LIBRARY": str(place / "libstub.so"),
            "STUB_DRIVER": str(compiled_driver(HERE / "driver.c", shared)),
        }
    )
    options = ["-q", "-p", "no:cacheprovider", "--no-header", CASES, *words]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        capture_output=True,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[3],
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert re.search(r"^[1-9]\d* passed", done.stdout, re.MULTILINE), done.stdout
