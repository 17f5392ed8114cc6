"""Recipes: which layers are in 8 bits, the file and its schema, what is refused, and the frontier they come from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml

from support.layered import HIDDEN, LAYERS, WIDTH, layered
from tilewright.calib import Recipe, collect, make_recipe, quantised_weights, read_observations, read_recipe
from tilewright.calib.judge.frontier import Sensitivity, sensitivity, within_budget
from tilewright.calib.recipe import json_schema
from tilewright.calib.recipe.evidence import Group, Point
from tilewright.calib.recipe.layers import standard_graph
from tilewright.export.systems import names, system
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.errors import AccuracyError, InputError, TilewrightError, UsageError

PUBLISHED = Path(__file__).parents[3] / "docs" / "recipe.schema.json"
UP = "show/up.weight"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return read_bundle(layered(tmp_path / "layers.bundle"))


@pytest.fixture
def observed(bundle: Bundle, pictures: Path) -> Any:
    collect(bundle, pictures, pictures.parent / "s.safetensors", images=2)
    return read_observations(pictures.parent / "s.safetensors")


@pytest.fixture
def recipe(bundle: Bundle, observed: Any) -> Recipe:
    return make_recipe(bundle, *observed, "int8", smooth=0.5)


def test_a_recipe_is_the_same_after_it_was_written_and_read(recipe: Recipe, tmp_path: Path) -> None:
    recipe.write(tmp_path / "r.yaml")
    assert read_recipe(tmp_path / "r.yaml") == recipe
    document = yaml.safe_load((tmp_path / "r.yaml").read_text())
    jsonschema.Draft202012Validator(json_schema()).validate(document)
    assert [e["factors"] for e in document["inputs"].values() if e["factors"]] == ["r.safetensors"]
    assert document["evidence"]["largest"].keys() == document["inputs"].keys()
    assert list(document["layers"][UP]) == ["weight", "kind", "inputs", "share", "why"]


def test_a_recipe_without_the_file_of_its_factors_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    recipe.write(tmp_path / "r.yaml")
    (tmp_path / "r.safetensors").unlink()
    refused(InputError, "r.safetensors does not hold the factors of 'show/", read_recipe, tmp_path / "r.yaml")


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == json_schema(), "write calib.recipe.json_schema() to docs/"


def test_shares_are_those_of_the_multiplications(recipe: Recipe) -> None:
    product = WIDTH * HIDDEN
    pixels = {"stem": 9 * 3 * WIDTH, "up": product, "gate": product, "down": 2 * product, "out": 3 * WIDTH}
    for name, work in pixels.items():
        assert recipe.layers[f"show/{name}.weight"].share == pytest.approx(work / sum(pixels.values()), abs=1e-6)
    linear = [pixels[name] for name in ("up", "gate", "down")]
    left = recipe.keeping(["show/up.weight", "show/stem.weight"], "as a test")
    assert left.share("linear") == pytest.approx(1 - linear[0] / sum(linear), abs=1e-5)
    assert left.quantised == set(LAYERS) - {"show/up.weight", "show/stem.weight"}


def test_layers_that_the_system_keeps_stay_in_float(
    bundle: Bundle, observed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "hitoksr"
    keeping = replace(system(name), keep={"*.stem.*": "no", "show/stem*": "it sees"})
    monkeypatch.setattr("tilewright.calib.recipe.make.system", lambda _: keeping)
    other = replace(bundle, manifest=replace(bundle.manifest, system=name))
    layers = make_recipe(other, *observed, "int8").layers
    assert layers["show/stem.weight"].weight == "kept"
    assert layers["show/stem.weight"].why == "it sees (show/stem*)"
    assert layers[UP].weight == "int8"


def test_every_system_says_what_it_keeps() -> None:
    assert all(system(name).keep for name in names())


REFUSED: list[tuple[str, Any, str]] = [  # a place in the document, a value, a part of the line
    ("format", "int4", "format 'int4' is not one of int8, fp8"),
    ("surprise", 1, "unknown key 'surprise'"),
    (f"layers/{UP}/weight", "float8_e4m3fn", "does not fit format 'int8'"),
    (f"layers/{UP}/inputs", ["show/nothing"], "inputs lacks 'show/nothing'"),
    (f"layers/{UP}/share", "much", "expected a finite number"),
    ("inputs/show/matrix/range", [2.0, 1.0], "must go from the lowest to the highest"),
    ("inputs/show/matrix/factors", [0.0], "factors must be above 0"),
]


@pytest.mark.parametrize(("place", "value", "said"), REFUSED, ids=[place for place, *_ in REFUSED])
def test_a_file_that_is_no_recipe_is_refused_in_one_line(
    place: str, value: Any, said: str, recipe: Recipe, tmp_path: Path
) -> None:
    path = tmp_path / "r.yaml"
    recipe.write(path)
    document = yaml.safe_load(path.read_text())
    within = document
    first, _, rest = place.partition("/")
    if rest:
        name, _, last = rest.rpartition("/")
        within, first = document[first][name], last
    within[first] = value
    path.write_text(yaml.safe_dump(document))
    refused(InputError, said, read_recipe, path)


def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("layers: [")
    refused(InputError, "r.yaml is no YAML", read_recipe, tmp_path / "r.yaml")
    refused(InputError, "cannot be read (No such file", read_recipe, tmp_path / "other.yaml")


def refused(kind: type[TilewrightError], said: str, act: Any, *arguments: Any, **options: Any) -> None:
    with pytest.raises(kind) as caught:
        act(*arguments, **options)
    assert said in str(caught.value) and str(caught.value).isprintable(), caught.value


def test_a_recipe_that_names_an_unknown_layer_is_refused(bundle: Bundle, recipe: Recipe, tmp_path: Path) -> None:
    renamed = replace(recipe, layers={"show/sideways.weight": recipe.layers[UP]} | recipe.layers)
    graphs = {"show": standard_graph(bundle, "show")}
    said = "layer 'show/sideways.weight' of the recipe is none of this bundle's 5"
    refused(InputError, said, quantised_weights, graphs, renamed, tmp_path / "w", "int8")


def test_wrong_options_and_statistics_of_another_bundle_are_refused(bundle: Bundle, observed: Any) -> None:
    seen, facts = observed
    refused(InputError, "the file of statistics is of another bundle", make_recipe, bundle, seen, {}, "int8")
    refused(UsageError, "format='int4' is not one of", make_recipe, bundle, seen, facts, "int4")
    refused(UsageError, "smooth=2 is not a number from 0 to 1", make_recipe, bundle, seen, facts, "int8", smooth=2)
    refused(UsageError, "method='best' is not one of", make_recipe, bundle, seen, facts, "int8", method="best")


PICTURES = [np.random.default_rng(7).integers(0, 255, (16, 16, 3)).astype(np.uint8)]


class Stopped(BaseException):
    """As an interrupt."""


@pytest.mark.slow
def test_the_frontier_begins_with_all_layers_and_goes_on_after_a_stop(
    bundle: Bundle, observed: Any, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"threads": 1, "enough_db": 200.0}
    path, other = tmp_path / "s.json", tmp_path / "t.json"
    found = sensitivity(bundle, *observed, PICTURES, path, "int8", **options)
    assert sorted(layer for group in found.groups for layer in group.layers) == sorted(LAYERS)
    assert [len(point.kept) for point in found.frontier] == list(range(len(LAYERS)))
    assert found.frontier[0].share == 1 and found.frontier[-1].mean_db > found.frontier[0].mean_db
    costs = {group.name: 10 ** (-group.mean_db / 10) / group.share for group in found.groups}
    assert list(found.frontier[-1].kept) == sorted(costs, key=costs.__getitem__, reverse=True)[:-1]
    last = next(group for group in found.groups if group.name not in found.frontier[-1].kept)
    assert found.frontier[-1].mean_db == last.mean_db  # it is alone in 8 bits again

    for at in (("groups", 3), ("frontier", 2)):

        def stop(part: str, done: int, total: int, at: tuple[str, int] = at) -> None:
            if (part, done) == at:
                raise Stopped

        with pytest.raises(Stopped):
            sensitivity(bundle, *observed, PICTURES, other, "int8", **options, on_progress=stop)
        assert not other.exists()
    refused(UsageError, "is of other options", sensitivity, bundle, *observed, PICTURES, other, "fp8", **options)
    assert sensitivity(bundle, *observed, PICTURES, other, "int8", **options) == found
    assert path.read_bytes() == other.read_bytes() and not list(tmp_path.glob("*.resume"))


def test_a_budget_keeps_no_more_than_it_must_and_tells_the_best_if_it_cannot_be_met(recipe: Recipe) -> None:
    groups = (Group("a", (UP,), 0.1, 30.0, 29.0), Group("b", ("show/stem.weight",), 0.1, 40.0, 39.0))
    points = (
        Point((), 1.0, 1.0, 28.0, 25.0),
        Point(("a",), 0.8, 0.9, 41.5, 39.0),
        Point(("a", "b"), 0.8, 0.9, 55.0, 51.0),
    )
    found = Sensitivity(recipe.networks, "int8", None, None, (), "kind", groups, points)
    least = within_budget(recipe, found, 20.0)
    assert least.layers == recipe.layers and least.evidence.frontier == points and least.evidence.budget_db == 20
    chosen = within_budget(recipe, found, 41.0)
    assert recipe.quantised - chosen.quantised == {UP, "show/stem.weight"}  # the same share, and closer
    assert chosen.layers[UP].why == "alone in 8 bits it costs most for its work: 30.0 dB"
    refused(AccuracyError, "no recipe reaches 60 dB; the best is 55.0 dB with 80%", within_budget, recipe, found, 60.0)
    other = replace(found, networks="0" * 64)
    refused(InputError, "the sensitivity is of another bundle", within_budget, recipe, other, 20.0)
