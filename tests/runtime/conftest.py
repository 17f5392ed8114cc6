"""Tiny real bundles, and a cache for them."""

import pytest

from support.bundles import (
    build,
    bundle,
    kernels,
    packed_bundle,
    staged,
    tint,
    tinted,
    tinting,
    two_folder_bundle,
    two_folders,
    weights_dir,
)
from support.scenes import restorer

__all__ = [
    "build",
    "bundle",
    "kernels",
    "packed_bundle",
    "restorer",
    "staged",
    "tint",
    "tinted",
    "tinting",
    "two_folder_bundle",
    "two_folders",
    "weights_dir",
]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TILEWRIGHT_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
