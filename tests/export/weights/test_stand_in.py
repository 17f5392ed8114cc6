"""Stand-ins hold every published name and shape, and no bytes."""

import json
from pathlib import Path

import pytest

from tilewright.export.build.attachment import find_references, origins_of
from tilewright.export.build.request import Request
from tilewright.export.systems import SYSTEMS, system
from tilewright.export.weights.stand_in import stand_in
from tilewright.runtime.errors import UsageError

pytestmark = pytest.mark.slow

TENSORS = {"transformer": 1160, "vae": 244}
OF_INSTANTIR = {"unet": 1680, "vae": 248}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_full_build_would_find_every_weight_and_nothing_else(name: str, tmp_path: Path) -> None:
    report = stand_in(system(name), tmp_path / "files")
    assert report["disk_bytes"] < 10_000_000 < report["apparent_bytes"]
    request = Request(name, None, tmp_path / "b", tmp_path / "files")
    assert request.stand_in
    assert request.settings == Request(name, "full", tmp_path / "b", tmp_path / "files").settings
    assert all(json.loads(file.read_text()) for file in (tmp_path / "files").rglob("*.json"))
    origins = origins_of(request, request.used)
    assert find_references(request, origins).keys() == request.parameters.keys()
    for origin, count in (TENSORS | OF_INSTANTIR if name == "instantir" else TENSORS).items():
        if origin in origins:
            assert len(origins[origin].tensors) == count


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine").write_text("work")
    with pytest.raises(UsageError, match="not empty"):
        stand_in(system("hitoksr"), tmp_path / "files")
