"""What a process has held, as far as the system tells."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.cli.restore import _restored
from tilewright.runtime import estimate as memory


@pytest.fixture
def without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, *arguments: object) -> str:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    monkeypatch.setattr(Path, "read_text", refuse)


@pytest.mark.usefixtures("without_proc")
def test_without_proc_the_peak_is_that_of_the_processs_life(monkeypatch: pytest.MonkeyPatch) -> None:
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert most * 1024 <= memory.peak_bytes() <= 2 * most * 1024
    monkeypatch.setattr(sys, "platform", "darwin")  # which counts bytes
    assert most <= memory.peak_bytes() <= 2 * most


@pytest.mark.usefixtures("without_proc")
def test_a_system_that_tells_nothing_is_no_fault_and_the_answer_says_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "resource", None)
    assert memory.peak_bytes() == 0
    assert memory.available_bytes() is None
    told = {"input_width": 1, "input_height": 1, "output": "o", "width": 1, "height": 1, "tiles": {"a": 1}}
    assert "; peak unknown\n" in _restored(
        Path("i"), told | {"seconds": {"total": 1.0}, "peak_bytes": 0, "engines": {"a": "e"}, "devices": ["cpu:0"]}
    )


def test_the_runtime_loads_where_there_is_no_resource() -> None:
    code = "import sys; sys.modules['resource'] = None; import tilewright.runtime, tilewright.cli.runtime"
    subprocess.run([sys.executable, "-c", code], check=True)
