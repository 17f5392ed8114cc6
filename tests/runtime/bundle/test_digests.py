"""Digests of sparse files are those of their bytes, and the zeros of their holes are not read."""

import errno
import hashlib
import os
import random
from pathlib import Path

import pytest

from tilewright.runtime.bundle.digests import sha256_of_file

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _forgetful(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path / "cache"))  # what one test notes another must not find


def sparse(path: Path, *parts: tuple[int, bool]) -> bytes:
    """Write a file of parts, (bytes, whether they are data), and return what reading it must give."""
    content = b""
    with path.open("wb") as file:
        for length, is_data in parts:
            block = random.Random(len(content)).randbytes(length) if is_data else bytes(length)
            if is_data:
                file.seek(len(content))
                file.write(block)
            content += block
        file.truncate(len(content))
    return content


def blocks(path: Path) -> int:
    return path.stat().st_blocks * 512


FILES = {
    "an empty file": [],
    "no hole": [(3 * MIB, True)],
    "no hole and an odd size": [(2 * MIB + 12345, True)],
    "nothing but a hole": [(5 * MIB, False)],
    "a hole of an odd size": [(3 * MIB + 777, False)],
    "a hole of one byte": [(1, False)],
    "a hole at the start": [(2 * MIB, False), (MIB, True)],
    "a hole in the middle": [(MIB, True), (2 * MIB, False), (MIB, True)],
    "a hole at the end": [(MIB, True), (2 * MIB, False)],
    "a hole at the end of an odd size": [(MIB, True), (2 * MIB + 4097, False)],
    "a small hole between": [(4096, True), (8192, False), (4096, True)],
    "holes everywhere": [(3 * MIB, False), (4096, True), (MIB + 4096, False), (9000, True), (7 * MIB + 1, False)],
    "data that begins inside a block": [(MIB + 5, False), (100, True), (2 * MIB, False), (3, True)],
    "data that is zeros": [(MIB, True), (64 * 1024, False), (10, True)],
}


@pytest.mark.parametrize("name", FILES)
def test_a_sparse_files_digest_is_that_of_its_bytes(tmp_path, name):
    content = sparse(tmp_path / "file", *FILES[name])
    assert (tmp_path / "file").read_bytes() == content
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_zeros_that_were_written_are_as_zeros_that_were_not(tmp_path):
    content = sparse(tmp_path / "sparse", (MIB, True), (4 * MIB, False), (MIB + 3, True))
    (tmp_path / "written").write_bytes(content)
    if blocks(tmp_path / "written") <= blocks(tmp_path / "sparse"):
        pytest.skip("this disk keeps no holes")
    one, other = (sha256_of_file(tmp_path / name) for name in ("sparse", "written"))
    assert one == other


@pytest.mark.parametrize("seed", range(8))
def test_any_pattern_of_holes_gives_the_digest_of_the_bytes(tmp_path, seed):
    draw = random.Random(seed)
    parts = [(draw.choice([1, 511, 4096, 65536, MIB - 1, MIB, MIB + 1]), draw.random() < 0.5) for _ in range(9)]
    content = sparse(tmp_path / "file", *parts)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_system_that_cannot_tell_of_holes_reads_them(tmp_path, monkeypatch):
    content = sparse(tmp_path / "file", (2 * MIB, False), (MIB, True), (MIB + 1, False))

    def refuse(descriptor, position, how):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "lseek", refuse)
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_a_system_that_knows_no_holes_reads_them(tmp_path, monkeypatch):
    content = sparse(tmp_path / "file", (2 * MIB, False), (MIB, True))
    monkeypatch.delattr(os, "SEEK_DATA")  # as on Windows
    assert sha256_of_file(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def read_so_far() -> int:
    """Bytes that this process has asked the system for."""
    return int(next(line for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line).split()[1])


def test_the_zeros_of_holes_are_not_read(tmp_path):
    content_bytes = 128 * MIB
    with (tmp_path / "file").open("wb") as file:
        file.write(b"head")
        file.truncate(content_bytes)
    if blocks(tmp_path / "file") > MIB:
        pytest.skip("this disk keeps no holes")
    before = read_so_far()
    digest = sha256_of_file(tmp_path / "file")
    assert read_so_far() - before < 8 * MIB
    assert digest == hashlib.sha256(b"head" + bytes(content_bytes - 4)).hexdigest()
