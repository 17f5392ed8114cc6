"""A bundle is sealed in one step: readers find the old one or the new one, whole."""

import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from support.forged import SEALED, refusal
from tilewright.runtime.bundle import write
from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.bundle.manifest import File
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.write import seal
from tilewright.runtime.errors import UsageError


def entries(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_sealing_moves_the_staged_directory_and_lists_every_file(staged, tmp_path):
    staging, manifest = staged()
    before = entries(tmp_path)
    seal(staging, manifest, tmp_path / "out" / "deep" / "x.bundle")
    assert entries(tmp_path) == before - {"staging"} | {"out"}
    assert entries(tmp_path / "out" / "deep") == {"x.bundle"}
    root = tmp_path / "out" / "deep" / "x.bundle"
    assert entries(root) == {"README.md", "bundle.json", *(name.split("/")[0] for name in SEALED)}
    files = read_bundle(root).manifest.files
    assert sorted(files) == SEALED
    for name, file in files.items():
        data = (root / name).read_bytes()
        assert (file.size, file.sha256) == (len(data), hashlib.sha256(data).hexdigest())


def test_files_that_the_caller_lists_are_listed_anew(staged, tmp_path):
    staging, manifest = staged()
    seal(staging, dataclasses.replace(manifest, files={"stale": File(1, "")}), tmp_path / "x.bundle")
    assert sorted(read_bundle(tmp_path / "x.bundle").manifest.files) == SEALED


def test_identical_inputs_give_an_identical_manifest_with_sorted_keys(build):
    one, other = build("one"), build("other")
    text = (one / "bundle.json").read_bytes()
    assert text == (other / "bundle.json").read_bytes()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True).encode() + b"\n"


@pytest.mark.parametrize("can_exchange", [True, False], ids=["exchanged", "renamed twice"])
def test_an_existing_bundle_is_replaced_and_nothing_is_left_beside_it(
    build, staged, tmp_path, monkeypatch, can_exchange
):
    target = build("x.bundle")
    (target / "old").touch()
    staging, manifest = staged()
    (staging / "new").touch()
    before = entries(tmp_path)
    if not can_exchange:
        monkeypatch.setattr(write.ctypes, "CDLL", lambda *_, **__: object())
    seal(staging, manifest, target)
    assert entries(tmp_path) == before - {"staging"}
    assert "new" in entries(target)
    assert "old" not in entries(target)
    read_bundle(target)


@pytest.mark.slow
def test_a_reader_finds_a_whole_bundle_at_every_moment_of_a_replacement(build, staged, tmp_path):
    target, done, read_times, faults = build("x.bundle"), threading.Event(), [], []

    def watch():
        while not done.is_set():
            try:
                assert json.loads((target / "bundle.json").read_bytes())["system"] == "sharpen"
            except (OSError, ValueError, AssertionError) as fault:
                faults.append(fault)
            read_times.append(1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for turn in range(20):
        seal(*staged(f"staging{turn}"), target)
    done.set()
    watcher.join()
    assert len(read_times) > 20
    assert not faults


def test_the_old_bundle_is_deleted_only_when_the_new_one_is_in_place(build, staged, monkeypatch):
    target = build("x.bundle")
    (target / "old").touch()
    staging, manifest = staged()
    seen = []
    delete = shutil.rmtree

    def watched(path, *rest, **more):
        seen.append(((path / "old").exists(), (target / "old").exists(), read_bundle(target).root))
        delete(path, *rest, **more)

    monkeypatch.setattr(write.shutil, "rmtree", watched)
    seal(staging, manifest, target)
    assert seen == [(True, False, target)]


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_all_is_on_disk_before_a_bundle_appears_and_its_name_soon_after(build, staged, tmp_path, monkeypatch, there):
    target = build("x.bundle") if there else tmp_path / "x.bundle"
    staging, manifest = staged()
    synced, before = [], []
    sync, exchange, rename = os.fsync, write._exchange, Path.rename

    def appearing(act, *arguments):
        if arguments[0] == staging:
            inodes = {path.stat().st_ino: path for path in [staging, *staging.rglob("*")]}
            before.extend(path for inode, path in inodes.items() if inode not in synced)
            synced.clear()
        return act(*arguments)

    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
    monkeypatch.setattr(write, "_exchange", lambda *arguments: appearing(exchange, *arguments))
    monkeypatch.setattr(Path, "rename", lambda *arguments: appearing(rename, *arguments))
    seal(staging, manifest, target)
    assert before == []
    assert target.parent.stat().st_ino in synced


def test_an_empty_directory_can_be_the_target(staged, tmp_path):
    (tmp_path / "x.bundle").mkdir()
    seal(*staged(), tmp_path / "x.bundle")
    read_bundle(tmp_path / "x.bundle")
    assert "staging" not in entries(tmp_path)


def test_a_link_to_a_bundle_keeps_pointing_at_it_when_it_is_replaced(build, staged, tmp_path):
    target = build("x.bundle")
    (target / "old").touch()
    (tmp_path / "latest").symlink_to("x.bundle")
    before = entries(tmp_path)
    seal(*staged(), tmp_path / "latest")
    assert entries(tmp_path) == before
    assert (tmp_path / "latest").readlink() == Path("x.bundle")
    assert "old" not in entries(target)
    read_bundle(tmp_path / "latest")


@pytest.mark.parametrize("kind", ["directory", "file"])
def test_a_target_that_is_something_else_is_refused_untouched(staged, tmp_path, kind):
    target = tmp_path / "photos"
    if kind == "directory":
        target.mkdir()
    holiday = target / "holiday.png" if kind == "directory" else target
    holiday.write_bytes(b"irreplaceable")
    staging, manifest = staged()
    with pytest.raises(UsageError, match=rf"^{target}: exists and is not a bundle of tilewright; choose another -o$"):
        seal(staging, manifest, target)
    assert holiday.read_bytes() == b"irreplaceable"
    assert entries(tmp_path) == {"models", "photos", "staging"}


def test_a_bundle_that_does_not_check_never_reaches_the_target(build, staged, tmp_path):
    target = build("x.bundle")
    before = (target / "bundle.json").read_bytes()
    staging, manifest = staged()
    reseal_free = json.loads((staging / "program.json").read_text()) | {"passes": []}
    (staging / "program.json").write_text(json.dumps(reseal_free))
    assert "no pass writes the grid 'result'" in refusal(seal, staging, manifest, target)
    assert (target / "bundle.json").read_bytes() == before
    read_bundle(target)


def test_writers_of_one_file_never_meet_in_a_temporary_one(tmp_path):
    with writing(tmp_path / "file") as one, writing(tmp_path / "file") as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "file").read_text() == "one"
    assert entries(tmp_path) == {"file"}


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    (tmp_path / "file").write_text("old")
    with pytest.raises(RuntimeError, match="halfway"), writing(tmp_path / "file") as temporary:
        temporary.write_text("new")
        raise RuntimeError("halfway")
    assert (tmp_path / "file").read_text() == "old"
    assert entries(tmp_path) == {"file"}


KILLED = """
import sys, time
from pathlib import Path
from tilewright.runtime.bundle.digests import writing

with writing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    print("ready", flush=True)
    time.sleep(600)
"""


def test_the_next_write_removes_what_a_killed_process_left_and_nothing_of_a_living_one(tmp_path):
    def begin(name):
        process = subprocess.Popen([sys.executable, "-c", KILLED, tmp_path / name], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    with begin("file") as killed, begin("file") as alive, begin("other") as of_another_file:
        try:
            for process in (killed, of_another_file):
                process.kill()
                process.wait()
            assert len(entries(tmp_path)) == 3
            with writing(tmp_path / "file") as temporary:
                temporary.write_text("whole")
            halves = entries(tmp_path) - {"file"}
            assert len(halves) == 2 and all(name.endswith(".part") for name in halves)
            assert {(tmp_path / name).read_text() for name in halves} == {"half"}
        finally:
            alive.kill()
    for name in ("file", "other"):
        with writing(tmp_path / name) as temporary:
            temporary.write_text("whole")
    assert entries(tmp_path) == {"file", "other"}


def test_a_file_is_written_with_the_mode_that_is_asked_for(tmp_path):
    before = os.umask(0o022)
    try:
        for mode, result in ((0o666, 0o644), (0o600, 0o600)):
            with writing(tmp_path / "file", mode) as temporary:
                temporary.write_text("x")
            assert (tmp_path / "file").stat().st_mode & 0o777 == result
    finally:
        os.umask(before)
