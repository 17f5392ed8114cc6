"""Faults that are planted into a copy of a real graph: each is found at its place, and nothing else is."""

from pathlib import Path

import onnx
import pytest

from support.faults import FAULTS
from support.planted import HERE, Planted
from tilewright.export.lint.lint import RULES, SIZE, lint_graph
from tilewright.runtime.bundle.read import read_bundle

COMPONENT = "decode"


@pytest.fixture(scope="module")
def real(hitoksr_tiny):
    """The bytes of a real graph, and a function from the location of a weight to its file."""
    bundle = read_bundle(hitoksr_tiny)
    places = bundle.files_of(COMPONENT)
    graph = bundle.path(bundle.manifest.components[COMPONENT].graph).read_bytes()
    return graph, lambda location: places.get(location, Path("nowhere") / location)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_and_nothing_else(real, tmp_path, name):
    graph, find = real
    planted, fault = Planted(onnx.load_from_string(graph)), FAULTS[name]
    at = fault.plant(planted)
    onnx.save(planted.model, tmp_path / "planted.onnx")
    findings, _ = lint_graph(COMPONENT, tmp_path / "planted.onnx", find)
    assert [(f.rule, f.node) for f in findings] == [(fault.rule, HERE if at is None else at)]
    assert fault.says in findings[0].problem and findings[0].remedy


def test_a_file_of_2_gib_is_found_before_it_is_read(tmp_path):
    with (tmp_path / "large.onnx").open("wb") as file:
        file.truncate(2**31)  # takes no disk
    findings, counts = lint_graph("large", tmp_path / "large.onnx", tmp_path.joinpath)
    assert [(f.rule, "2.1 GB" in f.problem) for f in findings] == [(SIZE, True)] and counts == {}


def test_every_rule_finds_a_planted_fault():
    assert {fault.rule for fault in FAULTS.values()} == set(RULES)
