"""One cache of builds and two bundles for the whole run, shared by its workers."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from support.shared import Shared, filled_once, folder_of_run

# every run tries the same examples: a change is judged by what it changes. --hypothesis-profile=default tries others
settings.register_profile("same", derandomize=True, database=None)
settings.load_profile("same")


TOGETHER = {  # what tests of several files build -> the beginnings of their paths
    "the C++ library": ("tests/runtime/cpp/",),
    "the models of demo/": ("tests/test_readme.py", "tests/tools/test_demo.py", "tests/calib/test_docs.py"),
}


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of the run's own, also for the commands that tests start."""
    directory = folder_of_run(tmp_path_factory) / "cache"
    directory.mkdir(exist_ok=True)
    before = os.environ.get("TILEWRIGHT_CACHE_DIR")
    os.environ["TILEWRIGHT_CACHE_DIR"] = str(directory)
    yield directory
    if before is None:
        del os.environ["TILEWRIGHT_CACHE_DIR"]
    else:
        os.environ["TILEWRIGHT_CACHE_DIR"] = before


@pytest.fixture(scope="session", autouse=True)
def _one_engine() -> Iterator[None]:
    """Builds that name no engines make one for each network, on every machine: each takes time."""
    from tilewright.export import targets

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            targets, "usual_engines", lambda machine, names, precisions: (names or ("ort",), precisions or ("float32",))
        )
        yield


@pytest.fixture(scope="session")
def shared(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """Name and filler -> the folder of that name, filled once a run; do not change it."""
    root = folder_of_run(tmp_path_factory) / "shared"
    return lambda name, fill: filled_once(root / name, fill)


@pytest.fixture(scope="session")
def hitoksr_tiny(shared: Shared) -> Path:
    """HiTokSR's tiny bundle with random weights; do not change it."""
    from tilewright.export.build.request import Request
    from tilewright.export.build.run import build

    return shared("hitoksr-tiny", lambda bundle: build(Request("hitoksr", "tiny", bundle, seed=0)))


@pytest.fixture(scope="session")
def in_token_tiny(shared: Shared) -> Path:
    """In-Token's tiny bundle with random weights; do not change it."""
    from tilewright.export.build.request import Request
    from tilewright.export.build.run import build

    return shared("in-token-tiny", lambda bundle: build(Request("in-token", "tiny", bundle, seed=0)))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What needs a diffusion system's bundle is slow; files with slow tests come first, so that workers end alike."""
    for item in items:
        if {"in_token_tiny", "vicr_tiny", "instantir_tiny"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays with one worker, and so do files that build the same things: a second worker would wait for them."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByGroup(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((name for name, files in TOGETHER.items() if file.startswith(files)), file)

    return ByGroup(config, log)


def pytest_collection_finish() -> None:
    """What was imported and collected stays until the end, so no search for garbage looks at it again."""
    gc.freeze()
