"""Sizes of a network from its configuration, its weights, options and a preset: who wins, and who may not disagree."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tilewright.export.system import Preset, Tensors
from tilewright.export.weights.config import Config
from tilewright.export.weights.sizes import FileSizes, blocks, config_beside, network_sizes, shapes_of
from tilewright.runtime.bundle.weights import Reference
from tilewright.runtime.errors import InputError, UsageError

USUAL = {"width": 8, "heads": 2, "levels": (4, 8), "act": "gelu"}
CONFIG, WEIGHTS = (
    FileSizes("config c.json", {"width": 16, "heads": 4}),
    FileSizes("weights w", {"width": 16, "levels": [4, 8]}),
)


def sizes(
    config: FileSizes | None,
    weights: FileSizes | None,
    *,
    named: bool = False,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    asked = {name: (f"--{name}", value) for name, value in ({"heads": None} | dict(options or {})).items()}
    return network_sizes("net", Preset("tiny", USUAL, named), USUAL, config, weights, asked)


def test_files_win_over_the_usual_and_options_fill_what_files_do_not_tell() -> None:
    assert sizes(None, None) == USUAL
    assert sizes(None, None, options={"heads": 8}) == USUAL | {"heads": 8}
    assert sizes(CONFIG, WEIGHTS) == {"width": 16, "heads": 4, "levels": [4, 8], "act": "gelu"}
    assert sizes(None, WEIGHTS, options={"heads": 8})["heads"] == 8
    assert sizes(CONFIG, WEIGHTS, options={"heads": 4})["heads"] == 4


def test_what_nothing_tells_is_named_once_with_its_flags(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tilewright"):
        sizes(None, WEIGHTS)
        sizes(CONFIG, WEIGHTS)
        sizes(None, FileSizes("weights w", {"width": 8}), named=True)  # who named the preset knows its sizes
        sizes(None, None)
    assert [record.message for record in caplog.records] == [
        "net: weights w alone does not tell all sizes; using heads 2, act 'gelu'; give --heads or its config.json"
        " if they differ",
        "net: weights w alone does not tell all sizes; using act 'gelu'; give its config.json if they differ",
    ]


def test_sources_that_disagree_are_named_with_their_values() -> None:
    with pytest.raises(InputError) as error:
        sizes(FileSizes("config c.json", {"width": 12}), WEIGHTS)
    assert str(error.value) == "config c.json: 'width' is 12, in weights w it is 16; give files that belong together"
    with pytest.raises(UsageError) as usage:
        sizes(CONFIG, WEIGHTS, options={"heads": 8})
    assert str(usage.value) == "--heads 8: config c.json says 4; leave --heads out"
    with pytest.raises(UsageError) as usage:
        sizes(None, WEIGHTS, named=True)
    assert str(usage.value) == "preset 'tiny' has width 8, weights w says 16; leave --preset out"


def held(**shapes: tuple[int, ...]) -> Tensors:
    tensors = {name.replace("__", "."): Reference("w", "float32", shape, 0, 4) for name, shape in shapes.items()}
    return Tensors(Path("/"), tensors, {"w": "w.safetensors"})


def test_tensors_that_tell_sizes_must_be_there_with_their_axes() -> None:
    tensors = held(net__a=(2, 3), net__b__0=(2,), net__b__1=(2,))
    shapes = shapes_of("weights", tensors, {"a": 2}, "give others", lambda key: key.removeprefix("net."))
    assert shapes == {"a": (2, 3), "b.0": (2,), "b.1": (2,)} and blocks(shapes, "b.") == 2
    with pytest.raises(InputError, match=r"^weights w.safetensors: 'net.a' has shape \[2, 3\]; give others$"):
        shapes_of("weights", tensors, {"net.a": 3}, "give others")
    with pytest.raises(InputError, match=r"lacks 'c' and holds net.a, net.b.0, net.b.1, ...; give others$"):
        shapes_of("weights", tensors, {"c": 1}, "give others")


def test_a_configuration_lies_in_the_folder_or_beside_the_file(tmp_path: Path) -> None:
    config = Config(("Net",), {"width": 8})
    assert config_beside(config, tmp_path) is None
    (tmp_path / "config.json").write_text('{"_class_name": "Net", "width": 24}')
    (tmp_path / "w.safetensors").touch()
    for place in (tmp_path, tmp_path / "w.safetensors"):
        assert config_beside(config, place) == FileSizes(f"config {tmp_path / 'config.json'}", {"width": 24})
