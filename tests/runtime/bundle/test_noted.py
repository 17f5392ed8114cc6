"""Digests are noted in the cache: a changed file is noticed, an unchanged one is not read again."""

import hashlib
import json
import os
import random
import time
from pathlib import Path

import pytest

from support.forged import SEALED, overwrite, refusal
from tilewright.runtime.bundle import digests
from tilewright.runtime.bundle.digests import cache_dir, sha256_of_bytes, sha256_of_file
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.errors import EnvironmentMismatch


@pytest.mark.parametrize("size", [0, 1, 2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_digest_is_that_of_hashlib(tmp_path, size):
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    for _ in range(2):
        assert sha256_of_file(tmp_path / "file") == hashlib.sha256(data).hexdigest() == sha256_of_bytes(data)


def test_a_change_that_keeps_the_size_is_noticed_by_its_time(tmp_path):
    overwrite(tmp_path / "file", b"one")
    first = sha256_of_file(tmp_path / "file")
    overwrite(tmp_path / "file", b"two")
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"two") != first


def test_a_file_put_in_the_place_of_another_is_noticed_even_with_its_time(tmp_path):
    for name, data in {"file": b"one", "other": b"two"}.items():
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"one")
    (tmp_path / "other").rename(tmp_path / "file")
    assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(b"two")


def test_a_change_in_place_is_noticed_even_with_the_time_put_back(tmp_path):
    seen = []
    for data in (b"one", b"two"):  # in place, so with the same inode
        (tmp_path / "file").write_bytes(data)
        os.utime(tmp_path / "file", ns=(10**18, 10**18))
        status = (tmp_path / "file").stat()
        seen.append((status.st_size, status.st_mtime_ns, status.st_ino))
        assert sha256_of_file(tmp_path / "file") == sha256_of_bytes(data)
        time.sleep(0.02)  # the clock of a disk ticks every few milliseconds
    assert seen[0] == seen[1]


def note_of(path: Path) -> Path:
    """Where the digest of a file as it is now is remembered."""
    return cache_dir() / "digests" / sha256_of_bytes(json.dumps(digests.identity_of(path)).encode())


def test_a_file_that_looks_unchanged_is_not_read_again_but_when_asked(tmp_path):
    (tmp_path / "file").write_bytes(b"one")
    right = sha256_of_file(tmp_path / "file")
    note_of(tmp_path / "file").write_text("0" * 64)
    assert sha256_of_file(tmp_path / "file") == "0" * 64
    assert sha256_of_file(tmp_path / "file", fresh=True) == right == sha256_of_bytes(b"one")
    assert sha256_of_file(tmp_path / "file") == right  # what was read takes the place of what was remembered


def test_a_file_that_changes_while_it_is_read_is_not_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"one")
    read_whole = digests._sha256

    def changing(path, on_read):
        found = read_whole(path, on_read)
        overwrite(path, b"two")
        return found

    monkeypatch.setattr(digests, "_sha256", changing)
    sha256_of_file(tmp_path / "file")
    assert not (tmp_path / "cache").exists()


def test_a_fresh_reading_reads_every_sealed_file_and_weights_once(bundle, weights_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    read_files, read_whole = [], digests._sha256

    def noting(path, on_read):
        read_files.append(path.name)
        return read_whole(path, on_read)

    monkeypatch.setattr(digests, "_sha256", noting)
    for fresh in (False, False, True):
        read_files.clear()
        whole = read_bundle(bundle, fresh=fresh)
        for _ in range(3):
            whole.folder("sharpen")
    assert sorted(read_files) == sorted([Path(name).name for name in SEALED] + ["sharpen.safetensors"])


def test_weights_that_a_wrong_note_vouches_for_are_noticed_by_a_fresh_reading(bundle, weights_dir):
    path = weights_dir / "sharpen.safetensors"
    sealed = sha256_of_file(path)
    overwrite(path, b"x" + path.read_bytes()[1:])
    sha256_of_file(path)
    note_of(path).write_text(sealed)
    assert read_bundle(bundle).folder("sharpen") == weights_dir
    assert "SHA-256 differs" in refusal(read_bundle(bundle, fresh=True).folder, "sharpen")


def test_without_a_home_a_bundle_reads_and_a_build_is_told_what_to_set(bundle, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TILEWRIGHT_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert read_bundle(bundle).folder("sharpen").is_dir()
    with pytest.raises(EnvironmentMismatch, match="; set TILEWRIGHT_CACHE_DIR"):
        cache_dir()


@pytest.mark.parametrize("note", [b"", b"0", b"g" * 64, b"\xff" * 64, b"\0" * 64, b"0" * 63 + b"\n", b"0" * 65, None])
def test_a_corrupt_note_is_ignored_and_written_anew(tmp_path, monkeypatch, note):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "file").write_bytes(b"data")
    right = sha256_of_bytes(b"data")
    assert sha256_of_file(tmp_path / "file") == right
    (path,) = (tmp_path / "cache" / "digests").iterdir()
    path.unlink()
    if note is None:
        path.mkdir()
    else:
        path.write_bytes(note)
    assert sha256_of_file(tmp_path / "file") == right
    assert note is None or path.read_bytes() == right.encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_bundle_reads_where_the_cache_cannot_be_written(bundle, tmp_path, monkeypatch):
    (tmp_path / "cache").write_bytes(b"a file in the way")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))
    assert read_bundle(bundle).folder("sharpen").is_dir()
    overwrite(bundle / "sharpen.onnx", b"\0" * (bundle / "sharpen.onnx").stat().st_size)
    assert "SHA-256 differs" in refusal(read_bundle, bundle)
    assert (tmp_path / "cache").read_bytes() == b"a file in the way"


def test_the_cache_lies_where_the_environment_says(monkeypatch, tmp_path):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", "/chosen")
    assert cache_dir() == Path("/chosen")
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_dir() == Path("/xdg/tilewright")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "tilewright"
