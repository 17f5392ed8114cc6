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


def restored(decode, deadline_s: float | None = None) -> np.ndarray:
    pixels = np.full((3, 64, 64), np.nan, np.float32)
    job = Job(canvas(64, 64), tile_px=64, overlap_px=0, on_final=lambda top, left, part: pixels.__setitem__(..., part))
    executor = Executor([CpuDevice("cpu:0", toys(HITOKSR) | {"decode": Toy(decode)})], deadline_s=deadline_s)
    Walk(program_of("hitoksr"), executor, {}, job).run({})
    executor.close()
    return pixels


def slow(codes: np.ndarray) -> dict[str, np.ndarray]:
    print("in a call", flush=True)
    time.sleep(CALL_S)
    return HITOKSR["decode"](codes)


@pytest.mark.slow
def test_a_suspended_process_goes_on_where_it_was() -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS)}
    with subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "in a call\n"
        process.send_signal(signal.SIGSTOP)
        time.sleep(SUSPENDED_S)
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == f"{float(restored(HITOKSR['decode']).sum())}\n"
    assert process.returncode == 0


if __name__ == "__main__":
    print(float(restored(slow, DEADLINE_S).sum()))
