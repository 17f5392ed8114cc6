"""One cache and one built bundle for the whole session."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the session's own, also for the commands that tests start."""
    directory = tmp_path_factory.mktemp("cache")
    before = os.environ.get("TILEWRIGHT_CACHE_DIR")
    os.environ["TILEWRIGHT_CACHE_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["TILEWRIGHT_CACHE_DIR"]
    else:
        os.environ["TILEWRIGHT_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def hitoksr_tiny(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny bundle, built by the command; do not change it."""
    bundle = tmp_path_factory.mktemp("bundles") / "hitoksr-tiny"
    words = ["export", "build", "hitoksr", "--preset", "tiny", "--random-weights", "0", "-o", str(bundle)]
    subprocess.run([sys.executable, "-m", "tilewright.cli.main", *words], check=True, capture_output=True)
    return bundle
