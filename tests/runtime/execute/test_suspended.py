"""A process that is suspended, as by Ctrl-Z: the time does not count as time of the call that it was in."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from support.walked_systems import HITOKSR
from support.walks import Toy, canvas, program_of, toys
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.execute.executor import Executor
from tilewright.runtime.execute.walk import Job, Walk

TESTS = Path(__file__).parents[2]
CALL_S, DEADLINE_S, SUSPENDED_S = 0.3, 2.0, 3.0


def restored(when: str = "never") -> str:
    """What a small program computes, in a process that is suspended in one of its calls."""
    pixels = np.full((3, 64, 64), np.nan, np.float32)
    job = Job(canvas(64, 64), tile_px=64, overlap_px=0, on_final=lambda top, left, part: pixels.__setitem__(..., part))

    def generate(image: np.ndarray) -> dict[str, np.ndarray]:  # the first call
        if when == "in a call":
            time.sleep(CALL_S)  # meanwhile the watching thread looks at it
            os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(CALL_S)
        elif when == "before it is watched":
            with executor.calls.lock:  # which the watching thread needs to look at it
                os.kill(os.getpid(), signal.SIGSTOP)
        return HITOKSR["generate"](image)

    devices = [CpuDevice("cpu:0", toys(HITOKSR) | {"generate": Toy(generate)})]
    executor = Executor(devices, deadline_s=DEADLINE_S)
    Walk(program_of("hitoksr"), executor, {}, job).run({})
    executor.close()
    return f"{float(pixels.sum())}\n"


@pytest.mark.slow
@pytest.mark.parametrize("when", ["in a call", "before it is watched"])
def test_a_suspended_process_goes_on_where_it_was(when: str) -> None:
    words, environment = [sys.executable, __file__, when], os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert os.WIFSTOPPED(os.waitpid(process.pid, os.WUNTRACED)[1])
        time.sleep(SUSPENDED_S)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == restored()
    assert process.returncode == 0


if __name__ == "__main__":
    print(restored(sys.argv[1]), end="")
