"""How the command behaves beside its answers: version, errors, streams, files that are there, colour, quiet."""

import importlib.metadata
import json
import os
import resource
import select
import shutil
import socket
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import tilewright.runtime
from support import forked
from support.commands import told
from tilewright.cli.commands import as_typed
from tilewright.cli.main import main
from tilewright.cli.terminal import Progress
from tilewright.runtime.plan.forecast import Forecast

VERSION = importlib.metadata.version("tilewright")
COMMAND = [sys.executable, "-m", "tilewright"]


def run(*words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return forked.run(words, **options)


def started(*words: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The command in a process that runs nothing else before."""
    return subprocess.run([*COMMAND, *map(str, words)], capture_output=True, timeout=300, check=False, **options)


@pytest.fixture
def restoring(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the picture in.png; the bundle that doubles it is the link `b`."""
    pixels = np.random.default_rng(1).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    (tmp_path / "b").symlink_to(bundle)
    monkeypatch.chdir(tmp_path)
    return tmp_path


RESTORE = ("runtime", "restore")


def refused(done: subprocess.CompletedProcess[Any], code: int, said: str) -> None:
    lines = (done.stderr if isinstance(done.stderr, str) else done.stderr.decode()).splitlines()
    assert (done.returncode, len(lines)) == (code, 1), lines
    assert lines[0].startswith("tilewright: ") and said in lines[0]


def test_the_version_is_told_by_the_script_the_module_and_python() -> None:
    script = Path(sys.executable).with_name("tilewright")
    for command in ([str(script)], COMMAND):
        answer = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert answer.stdout == f"tilewright {VERSION}\n" and answer.stderr == ""
    assert tilewright.runtime.__version__ == VERSION
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        _ = tilewright.runtime.nosuch  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["exprot"], "group 'exprot' is not one of export, runtime, calib, kernels, completion; did you mean export?"),
        (
            ["runtime", "restroe"],
            "verb 'restroe' is not one of restore, serve, plan, simulate, select, doctor, profile;"
            " did you mean restore?",
        ),
        (["runtime", "zzz"], "verb 'zzz' is not one of restore, serve, plan, simulate, select, doctor, profile"),
        (["export", "list", "--jsno"], "unknown argument '--jsno'; did you mean --json?; see tilewright export list"),
    ],
)
def test_a_misspelt_word_is_answered_with_the_nearest(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"tilewright: {said}")


def test_a_failure_under_json_is_one_object_and_the_line(tmp_path: Path) -> None:
    done = run("export", "inspect", tmp_path / "nowhere", "--json")
    error = json.loads(done.stdout)["error"]
    assert (error["code"], error["kind"], done.returncode) == (3, "BundleError", 3)
    assert done.stderr.decode() == f"tilewright: {error['message']}\n" and "nowhere" in error["message"]
    error = json.loads(run("export", "buidl", "--json").stdout)["error"]
    assert (error["code"], error["kind"]) == (2, "UsageError")


def test_a_check_that_measured_and_failed_tells_both_in_one_object(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    judged = {
        "backend": "b",
        "version": "b 1",
        "precision": "float32",
        "fault": "c.o: differs",
        "restore": {"psnr_db": 3.0, "deviation": 1.0},
    }
    judged |= {"components": {"c": {"outputs": {"o": {"relative_l2": 1.0, "max_abs": 2.0}}, "shapes": {"x": [1, 3]}}}}
    report = {"engines": {"e": judged}, "skipped": {"f": "needs more"}, "seams": {}, "reference": "r", "image": "i"}
    report |= {"processor": "p", "threads": 1}
    monkeypatch.setattr("tilewright.export.verify.engines.verify", lambda root, **options: report)
    copy = shutil.copytree(bundle, tmp_path / "b")
    assert main(["export", "verify", str(copy), "--json"]) == 7
    said = capsys.readouterr()
    answer = json.loads(said.out)
    assert answer["engines"] == report["engines"] and answer["error"]["kind"] == "AccuracyError"
    assert "polygraphy run onnx/c.onnx --onnxrt --input-shapes 'x:[1,3]'" in answer["error"]["message"]
    assert said.err == f"tilewright: {answer['error']['message']}\n"
    assert main(["export", "verify", str(copy)]) == 7
    said = capsys.readouterr()
    assert "c.o: relative L2 1.0e+00" in said.out and said.err == f"tilewright: {answer['error']['message']}\n"


@pytest.mark.slow
def test_an_image_goes_through_pipes_as_through_files(restoring: Path) -> None:
    picture = (restoring / "in.png").read_bytes()
    assert run(*RESTORE, "in.png", "out.png", "--bundle", "b").returncode == 0
    expected = np.asarray(Image.open("out.png"))
    piped = run(*RESTORE, "-", "-", "--bundle", "b", input=picture)
    assert piped.returncode == 0 and Image.open(BytesIO(piped.stdout)).format == "PNG"
    np.testing.assert_array_equal(np.asarray(Image.open(BytesIO(piped.stdout))), expected)
    assert "- 16x12 px -> - " in piped.stderr.decode()
    answer = run(*RESTORE, "in.png", "-", "--bundle", "b", "--format", "webp", "--json", "-q")
    assert Image.open(BytesIO(answer.stdout)).format == "WEBP"
    assert json.loads(answer.stderr)["output"] == "-"
    assert run(*RESTORE, "-", "piped.png", "--bundle", "b", input=picture).returncode == 0
    np.testing.assert_array_equal(np.asarray(Image.open("piped.png")), expected)


def test_a_failure_with_the_image_on_stdout_leaves_stdout_empty(restoring: Path) -> None:
    done = run(*RESTORE, "-", "-", "--bundle", "b", "--json", input=b"not an image")
    assert (done.returncode, done.stdout) == (8, b"")
    *lines, last = done.stderr.decode().splitlines()
    assert json.loads("\n".join(lines))["error"]["message"] == last.removeprefix("tilewright: ")
    refused(run(*RESTORE, "in.png", "out.png", "--bundle", "b", "--format", "png"), 2, "--format is for standard")


def test_a_terminal_is_no_place_for_an_image(restoring: Path) -> None:
    for words, said in [(("in.png", "-"), "standard output is"), (("-", "out.png"), "standard input holds")]:
        assert said in on_terminal(*RESTORE, *words, "--bundle", "b")
    assert not (restoring / "out.png").exists()


def test_the_input_and_read_only_files_are_replaced_only_by_force(restoring: Path) -> None:
    before = (restoring / "in.png").read_bytes()
    (restoring / "link.png").symlink_to("in.png")
    for name in ("in.png", "link.png"):
        refused(told(*RESTORE, "in.png", name, "--bundle", "b"), 2, f"{name} is the input itself")
    (restoring / "kept.png").write_bytes(before)
    (restoring / "kept.png").chmod(0o444)
    refused(told(*RESTORE, "in.png", "kept.png", "--bundle", "b"), 2, "kept.png is read-only")
    assert (restoring / "in.png").read_bytes() == before == (restoring / "kept.png").read_bytes()
    for name in ("kept.png", "in.png"):
        assert told(*RESTORE, "in.png", name, "--bundle", "b", "--force").returncode == 0
        assert (restoring / name).read_bytes() != before


def test_an_output_that_cannot_be_is_refused_before_the_image_is_read(restoring: Path) -> None:
    for name in ("out.xyz", "no/such/out.png", "."):
        refused(told(*RESTORE, "no-image.png", name, "--bundle", "b"), 2, name)


def test_pipes_and_sockets_are_no_files(restoring: Path) -> None:
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.png")
        for name in ("pipe.png", "socket.png"):
            refused(run(*RESTORE, name, "out.png", "--bundle", "b"), 8, f"{name} is a device or a pipe")
            refused(run(*RESTORE, "in.png", name, "--bundle", "b"), 2, f"{name} is a device or a pipe")


def test_a_reader_that_goes_away_is_no_error(restoring: Path) -> None:
    for words in (("export", "list", "--json"), (*RESTORE, "in.png", "-", "--bundle", "b", "-q")):
        reading, writing = os.pipe()
        os.close(reading)
        done = run(*words, stdout=writing)
        os.close(writing)
        assert done.returncode == 0 and b"Traceback" not in done.stderr
    closed = subprocess.run([*COMMAND, "export", "list"], preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE)
    assert (closed.returncode, closed.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_an_answer_that_does_not_fit_is_exit_5(restoring: Path) -> None:
    for words in (("export", "list"), (*RESTORE, "in.png", "-", "--bundle", "b", "-q")):
        with Path("/dev/full").open("wb") as full:
            done = run(*words, stdout=full)
        assert done.returncode == 5 and done.stderr.decode().count("\n") == 1
        assert "cannot be written (No space left on device)" in done.stderr.decode()


FULL_DISK = [
    ((*RESTORE, "in.png", "out.png", "--bundle", "b"), "out.png cannot be written (File too large)"),
    pytest.param(("export", "stand-in", "hitoksr", "-o", "files"), "files/", marks=pytest.mark.slow),  # loads PyTorch
]


@pytest.mark.parametrize(("words", "said"), FULL_DISK)
def test_a_disk_that_is_full_is_named_with_the_file_and_nothing_is_left(
    restoring: Path, words: tuple[str, ...], said: str
) -> None:
    def limit() -> None:  # what a full disk is to a process: its writes end short
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))

    before = set(restoring.iterdir())
    done = started(*words, "-q", preexec_fn=limit)
    refused(done, 5, said)
    assert "File too large" in done.stderr.decode()
    assert set(restoring.iterdir()) == before


def test_quiet_leaves_the_answer_alone(restoring: Path) -> None:
    done = run(*RESTORE, "in.png", "out.png", "--bundle", "b", "--quiet")
    assert done.stderr == b"" and done.stdout.startswith(b"in.png 16x12 px -> out.png")


def on_terminal(*words: str, **environment: str) -> str:
    """All that a command says where it is typed."""
    terminal, its = os.openpty()
    environment = {**os.environ, "TERM": "xterm", **environment}
    running = forked.Forked(words, stdin=its, stdout=its, stderr=its, env=environment)
    os.close(its)
    said = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            said += os.read(terminal, 65536)
        except OSError:  # it has ended
            break
    os.close(terminal)
    running.wait()
    return said.decode()


@pytest.mark.slow
def test_colour_is_for_terminals_and_no_color_takes_it_away(tmp_path: Path) -> None:
    words = ("export", "inspect", str(tmp_path / "nowhere"))
    assert "\x1b[1;31mtilewright:\x1b[0m " in on_terminal(*words)
    assert "\x1b" not in on_terminal(*words, NO_COLOR="1")
    assert "\x1b" not in on_terminal(*words, TERM="dumb")
    assert b"\x1b" not in run(*words).stderr


def test_a_terminal_sees_a_bar_that_is_gone_at_the_end(restoring: Path) -> None:
    said = on_terminal(*RESTORE, "in.png", "out.png", "--bundle", "b", "--tile", "8", "--overlap", "0")
    assert "\ropening the engines\x1b[K" in said and "\rwriting out.png\x1b[K" in said
    assert "\r\x1b[Kin.png 16x12 px -> out.png" in said
    assert "\x1b[K" not in on_terminal(*RESTORE, "in.png", "out.png", "--bundle", "b", "-q")


def test_lines_of_progress_are_seconds_apart_and_tell_what_is_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr("tilewright.cli.terminal.time.monotonic", lambda: now)
    with Progress(None, ["encode", "decode"]) as progress:
        for part, done, total, seconds in [
            ("encode", 1, 4, 4),
            ("encode", 2, 4, 4),  # 8 seconds for 2 of 4
            ("encode", 3, 4, 3),  # too soon after that line
            ("encode", 4, 4, 1),
            ("decode", 1, 50, 6),  # a new part: 6 seconds for 1 of 50, which begins where encode ended
        ]:
            now += seconds
            progress.tiles(part, done, total)
        progress.stage("trace", "started", 0.0, usual=130.0)
        now += 200
        progress.bytes("reading model", 10**9, 3 * 10**9)
        progress.doing("writing out.png")
        now += 30
        progress.share("writing out.png", 0.251)
    assert capsys.readouterr().err.splitlines() == [
        "1 of 2: encode 2/4 after 8 s, about 8 s left of encode",
        "2 of 2: decode 1/50 after 6 s, about 5 min left",
        "trace     started, about 2 min",
        "reading model 1.0 GB of 3.0 GB after 3 min, about 7 min left",
        "writing out.png 25% after 30 s, about 90 s left",
    ]


def test_one_bar_goes_over_all_passes_of_a_job(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now, shares = 100.0, [0.0]
    monkeypatch.setattr("tilewright.cli.terminal.time.monotonic", lambda: now)
    with Progress() as progress:
        progress.doing("opening the engines")
        now += 50
        progress.follow(lambda: Forecast(shares[-1], 60 * (1 - shares[-1]) if shares[-1] > 0.1 else None))
        for name, done, total, seconds, share in [
            ("encode", 1, 2, 6, 0.05),
            ("encode", 2, 2, 1, 0.1),  # too soon after that line
            ("sample", 10, 56, 6, 0.25),
            ("sample", 56, 56, 40, 0.9),
            ("decode", 1, 2, 6, 0.95),
        ]:
            now += seconds
            shares.append(share)
            progress.tiles(name, done, total)
    assert capsys.readouterr().err.splitlines() == [
        "5% (encode 1/2) after 6 s",
        "25% (sample 10/56) after 13 s, about 45 s left",
        "90% (sample 56/56) after 53 s, about 6 s left",
        "95% (decode 1/2) after 59 s, about 3 s left",
    ]


@pytest.mark.slow
def test_what_libraries_write_stays_away_unless_it_is_asked_for(restoring: Path) -> None:
    Image.open("in.png").resize((64, 64)).save("damaged.tif", compression="tiff_lzw")
    content = bytearray(Path("damaged.tif").read_bytes())
    content[3000:3200] = b"\xff" * 200
    Path("damaged.tif").write_bytes(content)
    words = (*RESTORE, "damaged.tif", "out.png", "--bundle", "b")
    refused(run(*words), 8, "damaged.tif cannot be decoded")  # not what libtiff says of it
    verbose = run(*words, "--verbose").stderr.decode()
    assert "Traceback" in verbose and "not yet in table" in verbose
    (restoring / "sitecustomize.py").write_text(
        "import atexit, logging, warnings\n"
        "def speak(): logging.getLogger('library').warning('logged'); warnings.warn('warned')\n"
        "atexit.register(speak)\n"
    )
    loud = {**os.environ, "PYTHONPATH": str(restoring)}
    assert started("export", "list", env=loud).stderr == b""
    assert b"library: logged" in started("export", "list", "--verbose", env=loud).stderr


@pytest.mark.parametrize(
    ("said", "typed"),
    [
        ("tile=7 is not a multiple of 16", "--tile 7 is not a multiple of 16"),
        ("over the limit: read it with max_pixels=64", "over the limit: read it with --max-pixels 64"),
        ("the text 'tile=7' has 3 tokens", "the text 'tile=7' has 3 tokens"),
        ("/data/tile=7/in.png: missing", "/data/tile=7/in.png: missing"),
        ("my_tile=7", "my_tile=7"),
    ],
)
def test_messages_name_options_as_they_are_typed(said: str, typed: str) -> None:
    assert as_typed(said, {"tile": "--tile", "max_pixels": "--max-pixels"}) == typed


def test_a_limit_is_raised_by_the_option_that_the_message_names(restoring: Path) -> None:
    words = (*RESTORE, "in.png", "out.png", "--bundle", "b")
    refused(told(*words, "--max-pixels", 10, "-q"), 8, "over the limit of 10: read it with --max-pixels 192")
    assert told(*words, "--max-pixels", 192).returncode == 0
