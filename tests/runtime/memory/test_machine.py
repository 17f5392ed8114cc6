"""How much memory is free and what a process has held, as far as the system tells."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.cli.restore import _restored
from tilewright.runtime.memory import machine


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)


@pytest.mark.usefixtures("without_proc")
def test_without_proc_the_peak_is_that_of_the_processs_life(monkeypatch: pytest.MonkeyPatch) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most * 1024 <= machine.peak_bytes() <= 2 * most * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts bytes
    assert most <= machine.peak_bytes() <= 2 * most


@pytest.mark.usefixtures("without_proc")
def test_a_system_that_tells_nothing_is_no_fault_and_the_answer_says_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert machine.peak_bytes() == 0
    assert machine.available_bytes() is None
    told = {"input_width": 1, "input_height": 1, "output": "o", "width": 1, "height": 1, "tiles": {"a": 1}}
    assert "; peak unknown\n" in _restored(
        Path("i"), told | {"seconds": {"total": 1.0}, "peak_bytes": 0, "engines": {"a": "e"}, "devices": ["cpu:0"]}
    )


def test_the_runtime_loads_where_there_is_no_resource() -> None:
    code = "import sys; sys.modules['resource'] = None; import tilewright.runtime, tilewright.cli.runtime"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_memory_is_what_the_system_and_the_control_group_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CONTROL_GROUP", tmp_path)
    system = machine.available_bytes()
    assert 0 < system < 2**50
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 100000\nactive_file 300000\ninactive_file 500000\nshmem 0\n")
    assert machine.available_bytes() > 900_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine.available_bytes() == 900_000  # files the group has read are dropped when memory is asked for
