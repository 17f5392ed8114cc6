"""`restore --resume`: a command that was stopped goes on later, and the file has the bytes of one that was not."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from support.forked import Forked
from support.scenes import noise
from support.shared import Shared
from tilewright.cli.main import main
from tilewright.runtime.engines import ort

SOON = ("--checkpoint", "0.0005")  # every 30 ms


@pytest.fixture
def folder(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: Shared) -> Path:
    """The current folder, with the picture in.png, the bundle `b`, and the result of a run without interruption."""
    Image.fromarray(noise(300, 400, 3, seed=1)).save(tmp_path / "in.png")
    (tmp_path / "b").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    shutil.copy(shared("right.png", lambda target: restored("in.png", target)), "right.png")
    return tmp_path


def words_of(source: str, target: str, *words: str) -> list[str]:
    return ["runtime", "restore", source, target, "--bundle", "b", "--tile", "32", "--overlap", "16", *words]


def restore(source: str, target: str, *words: str) -> int:
    return main(words_of(source, target, *words))


def restored(source: str, target: Path) -> None:
    assert restore(source, str(target)) == 0


def stopped(number: signal.Signals, source: str, target: str, *words: str, once="out.png.resume", again=None):
    """Run a command, and send it a signal as soon as there is a file of finished parts. Its code and its last line."""
    before = Path(once).stat().st_ino if Path(once).exists() else None
    words = words_of(source, target, *words, "-q")
    with Forked(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as running:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and running.poll() is None:
            if Path(once).exists() and Path(once).stat().st_ino != before and Path(once).stat().st_size:
                break
            time.sleep(0.005)
        running.send_signal(number)
        if again is not None:
            time.sleep(again)
            running.send_signal(number)
        said = running.communicate(timeout=60)[1]
    return running.returncode, said


def same(target: str = "out.png") -> bool:
    return Path(target).read_bytes() == Path("right.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "interr", marks=pytest.mark.slow)],
)
def test_a_command_that_is_told_to_stop_twice_goes_on_each_time(folder, capsys, number, code, word) -> None:
    for turn in ((), ("--resume",)):
        returned, said = stopped(number, "in.png", "out.png", *SOON, *turn)
        assert returned == code and said.startswith(f"tilewright: {word}"), said
        assert said.endswith(
            "; what was finished is kept in out.png.resume: the same command with --resume goes on from there\n"
        )
        assert not (folder / "out.png").exists()
    capsys.readouterr()
    assert restore("in.png", "out.png", "--resume", "--json") == 0
    out, err = capsys.readouterr()
    assert 0 < json.loads(out)["resumed"] < 1 and "goes on from out.png.resume: " in err
    assert same() and sorted(p.name for p in folder.iterdir() if p.is_file()) == ["in.png", "out.png", "right.png"]


@pytest.mark.slow
def test_a_second_signal_does_not_interrupt_the_keeping(folder) -> None:
    for wait in (0, 0.01, 0.05):
        returned, said = stopped(signal.SIGTERM, "in.png", "out.png", *SOON, again=wait)
        assert returned == 143 and said.endswith("--resume goes on from there\n"), said
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["in.png", "out.png.resume", "right.png"]
    assert restore("in.png", "out.png", "--resume") == 0 and same()


@pytest.mark.slow
def test_a_full_disk_says_that_nothing_could_be_kept(folder) -> None:
    command = [sys.executable, "-m", "tilewright", *words_of("in.png", "out.png", "-q")]
    limited = ["sh", "-c", 'ulimit -f 8; exec "$@"', "sh", *command]  # no file may have more than 8 KiB
    done = subprocess.run(limited, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 5 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("tilewright: out.png cannot be written (File too large)"), done.stderr
    assert done.stderr.endswith("; what was finished could not be kept (File too large)\n")
    assert sorted(p.name for p in folder.iterdir() if p.is_file()) == ["in.png", "right.png"]


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_from_its_last_checkpoint(folder, capsys) -> None:
    returned, said = stopped(signal.SIGKILL, "in.png", "out.png", *SOON)
    assert (returned, said) == (-9, "")
    capsys.readouterr()
    assert restore("in.png", "out.png", "--resume", "--devices", "cpu:0,cpu:1", "--threads", "1", "--json") == 0
    assert 0 < json.loads(capsys.readouterr().out)["resumed"] < 1
    assert same()


@pytest.mark.slow
def test_another_seed_is_one_line_with_both_values_and_loses_nothing(folder, capsys) -> None:
    stopped(signal.SIGTERM, "in.png", "out.png", *SOON, "--seed", "1")
    data = (folder / "out.png.resume").read_bytes()
    capsys.readouterr()
    assert restore("in.png", "out.png", "--resume", "--seed", "2", "-q") == 2
    assert capsys.readouterr().err == (
        "tilewright: out.png.resume is of a restoration with --seed 1, and this one has --seed 2; ask for the same as"
        " before, or remove the file to begin anew\n"
    )
    assert (folder / "out.png.resume").read_bytes() == data and not (folder / "out.png").exists()
    assert restore("in.png", "out.png", "--seed", "1", "--resume") == 0 and same()  # this bundle has no noise
    capsys.readouterr()


@pytest.mark.slow
def test_a_command_without_resume_says_that_it_could_go_on(folder, capsys) -> None:
    stopped(signal.SIGTERM, "in.png", "out.png", *SOON)
    capsys.readouterr()
    assert restore("in.png", "out.png") == 0
    assert re.search(
        r"^note: out.png.resume holds \d+% of an earlier restoration; to go on from there, add --resume$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    assert same() and not (folder / "out.png.resume").exists()


@pytest.mark.slow
def test_with_nothing_to_go_on_from_it_begins_anew_and_says_so(folder, capsys) -> None:
    capsys.readouterr()
    assert restore("in.png", "out.png", "--resume", "--json") == 0
    out, err = capsys.readouterr()
    assert "note: there is no out.png.resume, so this begins anew\n" in err and json.loads(out)["resumed"] == 0
    assert same()


def test_a_damaged_file_is_exit_8_and_stays(folder, capsys) -> None:
    (folder / "out.png.resume").write_bytes(b"half")
    capsys.readouterr()
    assert restore("in.png", "out.png", "--resume", "-q") == 8
    assert capsys.readouterr().err == (
        "tilewright: out.png.resume is damaged or no file of finished parts; remove it to begin anew\n"
    )
    assert (folder / "out.png.resume").read_bytes() == b"half" and not (folder / "out.png").exists()


def test_words_that_cannot_be(folder, capsys) -> None:
    for words, said in {
        ("in.png", "-", "--resume"): "--resume needs a file as the output; name one instead of -",
        ("in.png", "out.png", "--checkpoint", "-1"): "--checkpoint '-1' is not a number of minutes from 0 to",
        ("in.png", "out.png", "--checkpoint", "soon"): "--checkpoint 'soon' is not a number of minutes",
        ("in.png", "out.png", "--checkpoint", "nan"): "--checkpoint 'nan' is not a number of minutes",
    }.items():
        capsys.readouterr()
        assert restore(*words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error


@pytest.mark.slow
def test_a_device_that_fails_for_good_says_that_the_work_is_kept(folder, capsys, monkeypatch) -> None:
    run, calls = ort.OrtEngine.run, itertools.count()

    def fails(engine, inputs, outputs):
        if next(calls) >= 20:
            raise RuntimeError("fell off the bus")
        return run(engine, inputs, outputs)

    with monkeypatch.context() as patched:
        patched.setattr(ort.OrtEngine, "run", fails)
        capsys.readouterr()
        assert restore("in.png", "out.png", "-q", "--json") == 1
    out, err = capsys.readouterr()
    assert "what was finished is kept in out.png.resume" in err
    assert "what was finished is kept in out.png.resume" in json.loads(out)["error"]["message"]
    assert restore("in.png", "out.png", "--resume") == 0 and same()
    capsys.readouterr()


# Folders


@pytest.fixture
def many(folder: Path, shared: Shared) -> Path:
    """The folder `in` of 12 pictures, and their results in `right`."""
    (folder / "in").mkdir()
    for i in range(12):
        Image.fromarray(noise(40 + 20 * i, 100, 3, seed=i)).save(folder / "in" / f"{i:02}.png")
    shutil.copytree(shared("right", lambda target: restored("in", target)), "right")
    assert not (folder / "right" / "finished.resume").exists()
    return folder


def contents(name: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(name).iterdir() if path.suffix == ".png"}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_folder_goes_on_with_the_images_that_are_left(many, capsys, number) -> None:
    returned, said = stopped(number, "in", "out", *SOON, once="out/finished.resume")
    if number == signal.SIGTERM:
        assert returned == 143 and said == (
            "tilewright: terminated; what was finished is kept in out: the same command with --resume goes on from"
            " there\n"
        )
    finished = contents("out")
    assert 0 < len(finished) < 12
    times = {name: (many / "out" / name).stat().st_mtime_ns for name in finished}
    with (many / "out" / "finished.resume").open("a") as file:
        file.write('{"result": "11.png", "fi')  # as a crash leaves it
    capsys.readouterr()
    assert restore("in", "out", "--resume", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    before = {Path(row["output"]).name for row in rows if row.get("finished_before")}
    assert before and before <= finished.keys()
    assert {name: (many / "out" / name).stat().st_mtime_ns for name in before} == {n: times[n] for n in before}
    assert contents("out") == contents("right")
    assert sorted(path.name for path in (many / "out").glob("*.resume")) == ["finished.resume"]
    assert restore("in", "out", "--resume") == 0
    assert "12 of 12 images in " in (said := capsys.readouterr().out) and "; 12 were finished before" in said


@pytest.mark.slow
def test_what_is_not_of_this_job_is_made_again_and_other_arguments_are_refused(many, capsys) -> None:
    assert restore("in", "out", "--resume") == 0
    (many / "out" / "03.png").write_bytes(b"another tool's")
    (many / "out" / "04.png").unlink()
    Image.fromarray(noise(50, 60, 3, seed=99)).save(many / "in" / "05.png")
    Image.fromarray(noise(50, 60, 3, seed=98)).save(many / "in" / "new.png")
    capsys.readouterr()
    assert restore("in", "out", "--resume", "--seed", "7", "-q") == 2
    assert capsys.readouterr().err == (
        "tilewright: out/finished.resume is of a restoration with --seed 0, and this one has --seed 7; ask for the same"
        " as before, or remove the file to begin anew\n"
    )
    assert restore("in", "out", "--resume", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["images"]
    again = [Path(row["output"]).name for row in rows if "finished_before" not in row]
    assert again == ["03.png", "04.png", "05.png", "new.png"]
    assert restore("in", "right") == 0 and contents("out") == contents("right")
    capsys.readouterr()


@pytest.mark.slow
def test_parts_of_an_image_that_has_changed_are_a_failure_of_this_image_only(many, capsys) -> None:
    stopped(signal.SIGTERM, "in/11.png", "out.png", *SOON)
    (many / "out").mkdir()
    (many / "out.png.resume").rename(many / "out" / "11.png.resume")
    Image.fromarray(noise(50, 60, 3, seed=99)).save(many / "in" / "11.png")
    capsys.readouterr()
    assert restore("in", "out", "--resume", "-q") == 2
    out, err = capsys.readouterr()
    assert (
        "11 of 12 images" in out and "1 of 12 images failed, the first is in/11.png: out/11.png.resume is of a" in err
    )
    assert (many / "out" / "11.png.resume").exists()
