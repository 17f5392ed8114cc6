"""Builds that are killed, interrupted, or share a cache."""

import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

import pytest

from support.forked import Forked
from tilewright.export.build.cache import filling, staging
from tilewright.runtime.bundle.read import read_bundle

# seconds a stage takes, about
LASTS = {"attach": 0.02, "constants": 0.02, "trace": 1.0, "optimise": 0.1, "verify": 0.2, "seal": 0.02}
TOY = Path(__file__).parents[1] / "toy" / "packages"  # a system whose networks are traced in no time


def started(out: Path, *more: str, importing: bool = False) -> subprocess.Popen[str]:
    """A build in a process of its own, with a cache beside its bundle."""
    words = ("build", "toy", "--random-weights", "0", "--target", "ort", "-o", str(out), *more)
    return command(out, *words, importing=importing)


def command(out: Path, *words: str, importing: bool = False) -> subprocess.Popen[str]:
    """A command that has its modules, or one that imports them."""
    begun: Callable[..., subprocess.Popen[str]] = partial(Forked, torch=True)
    arguments = ["export", *words]
    if importing:
        begun, arguments = subprocess.Popen, [sys.executable, "-m", "tilewright", *arguments]
    environment = {**os.environ, "TILEWRIGHT_CACHE_DIR": str(out.parent / "cache"), "PYTHONPATH": str(TOY)}
    return begun(arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for(running: subprocess.Popen[str], stage: str) -> None:
    assert running.stderr is not None
    assert any(line.split() == [stage, "started"] for line in running.stderr)


def has_signals_in_hand(process: subprocess.Popen[str]) -> bool:
    """Whether a process has a handler of SIGTERM, as the system says."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def left_over(root: Path) -> list[Path]:
    """Hidden files and folders, which only a killed process may leave."""
    return list(root.rglob(".*"))


@pytest.mark.slow
def test_a_killed_build_is_finished_by_the_next(tmp_path: Path) -> None:
    out, built = tmp_path / "b", tmp_path / "cache" / "build"
    moments, killed = random.Random(0), 0
    for stage, seconds in LASTS.items():
        shutil.rmtree(built / stage, ignore_errors=True)  # so that it runs again
        running = started(out)
        wait_for(running, stage)
        time.sleep(moments.uniform(0, seconds))
        running.kill()
        running.communicate()
        killed += running.returncode == -signal.SIGKILL
        if out.exists():
            read_bundle(out)  # a bundle that is there is whole
            shutil.rmtree(out)
    assert killed >= len(LASTS) // 2, "most builds ended before they were killed"
    finishing = started(out)
    assert (finishing.communicate(), finishing.returncode)[1] == 0
    verifying = command(out, "verify", str(out))
    assert (verifying.communicate(), verifying.returncode)[1] == 0
    # a note of a digest that was being written stays until the same file is noted again
    assert [path for path in left_over(tmp_path) if path.parent.name != "digests"] == []


SIGNALS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
STOPPED = [(None, signal.SIGINT), (None, signal.SIGTERM)]  # while modules are imported
STOPPED += [("trace", signal.SIGTERM), ("trace", signal.SIGINT), ("verify", signal.SIGTERM)]


@pytest.mark.slow
def test_a_signal_at_any_moment_ends_a_build_in_one_line(tmp_path: Path) -> None:
    moments = random.Random(1)
    for stage, number in STOPPED:
        running, (code, said) = started(tmp_path / "b", importing=stage is None), SIGNALS[number]
        while not has_signals_in_hand(running):  # before, Python itself starts
            time.sleep(0.001)
        if stage:
            wait_for(running, stage)
        time.sleep(moments.uniform(0, LASTS[stage or "trace"]))
        running.send_signal(number)
        _, stderr = running.communicate()
        lines = [line for line in stderr.splitlines() if line.split()[0] not in LASTS]
        if running.returncode == 0:  # it was faster
            assert lines == [] or lines[0].startswith("tilewright: built")
        else:
            assert (running.returncode, lines) == (code, [f"tilewright: {said}; finished stages of a build are kept"])
        if (tmp_path / "b").exists():
            read_bundle(tmp_path / "b")
        assert left_over(tmp_path) == []
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.slow
def test_builds_at_once_on_a_fresh_cache_all_succeed(tmp_path: Path) -> None:
    outputs = ("one", "same", "same")
    running = [started(tmp_path / name, "--verify", "never") for name in outputs]
    said = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], said
    assert sum(line.split()[:2] == ["trace", "done"] for text in said for line in text.splitlines()) == 1
    assert len({read_bundle(tmp_path / name).digest for name in outputs}) == 1
    assert left_over(tmp_path) == []


def test_the_slower_of_two_builds_waits_and_takes_what_is_there(tmp_path: Path) -> None:
    from threading import Thread

    target, events = tmp_path / "stage" / "key", []

    def other() -> None:
        with filling(target, lambda: events.append("waits")) as folder:
            events.append("finds it" if folder is None else "fills it again")

    with filling(target) as folder:
        assert folder is not None
        thread = Thread(target=other)
        thread.start()
        while not events:
            time.sleep(0.01)
        (folder / "result").write_text("done")
    thread.join()
    assert events == ["waits", "finds it"] and (target / "result").read_text() == "done"
    assert left_over(tmp_path) == []


def test_a_failed_stage_is_taken_over_by_the_one_that_waits(tmp_path: Path) -> None:
    target = tmp_path / "stage" / "key"
    with pytest.raises(ZeroDivisionError), filling(target):
        raise ZeroDivisionError
    assert not target.exists() and left_over(tmp_path) == []
    with filling(target) as folder:
        assert folder is not None
    assert target.is_dir()


def test_a_live_builds_folder_stays_and_a_killed_ones_goes(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    dead = tmp_path / ".bundle.dead.part"
    dead.mkdir()
    with staging(target) as live:
        assert not dead.exists()
        with staging(target) as mine:
            assert live.is_dir() and mine != live
        assert live.is_dir()
    assert left_over(tmp_path) == []


@pytest.mark.slow
def test_a_signal_between_instructions_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tilewright.cli import main
    from tilewright.runtime.bundle.digests import writing

    def fill() -> None:
        with filling(tmp_path / "stage" / "key") as folder:
            assert folder is not None
            with writing(folder / "file") as temporary:
                temporary.write_text("text")

    monkeypatch.setattr(main, "_stopped_by", [])
    monkeypatch.setattr(main, "RETRY_S", 1e-4)
    codes = {filling.__wrapped__.__code__, staging.__wrapped__.__code__, writing.__wrapped__.__code__, fill.__code__}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)}
    signal.signal(signal.SIGTERM, main._stop)
    signal.signal(signal.SIGALRM, main._again)
    stopped = finished = 0
    try:
        for moment in range(0, 100_000, 3):
            countdown = moment

            def trace(frame: FrameType, event: str, argument: object) -> object:
                nonlocal countdown
                if frame.f_code not in codes and not frame.f_code.co_filename.endswith(("/cache.py", "/pathlib.py")):
                    return None
                frame.f_trace_opcodes = True
                if event == "opcode":
                    countdown -= 1
                    if countdown == -1:
                        signal.raise_signal(signal.SIGTERM)
                return trace

            sys.settrace(trace)
            try:
                fill()
                sys.settrace(None)
                finished += countdown >= 0
            except KeyboardInterrupt:
                stopped += 1
            finally:
                sys.settrace(None)
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert left_over(tmp_path) == [], moment
            shutil.rmtree(tmp_path / "stage", ignore_errors=True)
            if finished:
                break
    finally:
        logging.disable(logging.NOTSET)  # a command that is stopped turns logs off, and this process goes on
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert stopped > 250, stopped
