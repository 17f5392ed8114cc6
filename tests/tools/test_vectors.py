"""The vectors that other languages read are what Python computes today."""

from pathlib import Path

import vectors


def test_the_vectors_are_current():
    folder = Path(__file__).parents[1] / "vectors"
    files = {path.name: path.read_text() for path in folder.iterdir()}
    assert files == vectors.written(), "run .venv/bin/python tools/vectors.py, and say in the commit why they change"
    assert sum(map(len, files.values())) < 300 * 1024
