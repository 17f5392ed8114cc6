"""This machine is read from the system and from the metadata of packages."""

import platform
import shutil
import subprocess
import sys
from importlib import metadata

import numpy as np
import onnxruntime
import pytest

from tilewright.runtime.engines import BACKENDS, machine
from tilewright.runtime.engines.machine import this_machine

DRIVER = """
int cuInit(unsigned flags) { return FAILS; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = number; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 - device : attribute == 76 ? 6 * device : -1;
    return 0;
}
"""  # two GPUs of capability 9.0 and 8.6


def test_versions_are_those_of_the_packages():
    here = this_machine(["numpy", "no-package-of-this-name"])
    for package, name in (("openvino", "openvino"), ("torch", "aoti")):
        assert here.packages.pop(package, "none") == (metadata.version(package) if name in here.backends else "none")
    assert here.packages == {"numpy": np.__version__, "onnxruntime": onnxruntime.__version__}
    assert {*here.backends, *here.missing} == {*BACKENDS} and "ort" in here.backends


def test_instruction_sets_are_those_that_numpy_finds():
    from numpy._core._multiarray_umath import __cpu_features__

    names = {"AVX2": "avx2", "AVX512F": "avx512f", "AVX512_SPR": "avx512_fp16", "ASIMD": "asimd"}
    for feature, name in names.items():
        if feature in __cpu_features__:
            assert (name in this_machine().instructions) == __cpu_features__[feature]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 amx_int8\nvmx flags\t: vnmi\n", ("amx_int8", "avx2", "fpu")),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", ("asimd", "bf16", "fp")),
        ("processor\t: 0\n", ()),
        (None, ()),
    ],
    ids=["x86", "Arm", "neither", "no such file"],
)
def test_instruction_sets_are_read_as_the_kernel_writes_them(text, names, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert this_machine().instructions == names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        (
            "cpu family\t: 6\nmodel\t\t: 167\nmodel name\t: Intel(R) Xeon(R)\nstepping\t: 1\n\nmodel\t\t: 85\n",
            "Intel(R) Xeon(R), family 6, model 167, stepping 1",
        ),
        (
            "processor\t: 0\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n",
            f"{platform.machine()}, CPU implementer 0x41, CPU part 0xd0c",
        ),
        ("processor\t: 0\n", platform.machine()),
        (None, platform.machine()),
    ],
    ids=["x86", "Arm", "neither", "no such file"],
)
def test_a_processor_is_told_by_its_name_and_its_numbers(text, name, tmp_path, monkeypatch):
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert this_machine().processor == name


@pytest.mark.parametrize(("fails", "capability"), [(0, (8, 6)), (100, None)])
def test_the_least_of_the_gpus_is_told_by_their_driver(fails, capability, tmp_path, monkeypatch):
    if not (compiler := shutil.which("cc")):
        pytest.skip("no C compiler, which makes a driver without a GPU")
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so"
    subprocess.run([compiler, "-shared", "-fPIC", f"-DFAILS={fails}", tmp_path / "driver.c", "-o", library], check=True)
    monkeypatch.setattr(machine, "CUDA", str(library))
    here = this_machine()
    assert here.compute_capability == capability
    assert here.devices == (("cpu", "cuda") if capability else ("cpu",))
    assert this_machine(kinds=["cpu"]).devices == ("cpu",)


def test_no_package_of_a_backend_is_imported():
    code = (
        "from tilewright.runtime.engines.machine import this_machine; this_machine(); import sys; print(*sys.modules)"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "tilewright.runtime.engines.ort" in loaded
    assert "onnxruntime" not in loaded
