"""Stand-ins hold every published name and shape, and no bytes."""

from pathlib import Path

import pytest

from tilewright.export.build.request import Request
from tilewright.export.graph.trace import parameter_specs
from tilewright.export.systems import SYSTEMS, system
from tilewright.export.weights.files import attach
from tilewright.export.weights.stand_in import stand_in
from tilewright.runtime.errors import UsageError

TENSORS = {"transformer": 1160, "vae": 244}
OF_INSTANTIR = {"unet": 1680, "vae": 248}


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_full_build_would_find_every_weight_and_nothing_else(name: str, tmp_path: Path) -> None:
    made = stand_in(name, tmp_path / "files")
    assert made["disk_bytes"] < 10_000_000 < made["apparent_bytes"]
    request = Request(name, "full", tmp_path / "b", tmp_path / "files")
    assert request.stand_in
    wanted = {
        component: {key: tuple(int(d) for d in spec.shape) for key, spec in parameter_specs(source).items()}
        for component, source in (request.components | request.build_time).items()
    }
    module = system(name)
    found = {origin: module.ORIGINS[origin].read(tensors) for origin, tensors in request.found.items()}
    unread = "embeddings.mask_token"  # of DINOv3, which no graph needs
    wanted = {c: {k: s for k, s in of.items() if not k.endswith(unread)} for c, of in wanted.items()}
    references = attach(wanted, found, module)
    assert references.keys() == wanted.keys()
    for origin, count in (TENSORS | OF_INSTANTIR if name == "instantir" else TENSORS).items():
        if origin in found:
            assert len(found[origin].tensors) == count


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "mine").write_text("work")
    with pytest.raises(UsageError, match="not empty"):
        stand_in("hitoksr", tmp_path / "files")
    with pytest.raises(UsageError, match="is not one of"):
        stand_in("nothing", tmp_path / "other")
