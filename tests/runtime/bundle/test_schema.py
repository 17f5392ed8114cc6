"""The published JSON Schema is the one the reader's dataclasses give."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest

from support.forged import DOCUMENTS, REQUIRED
from tilewright.runtime.bundle.read import json_schema
from tilewright.runtime.bundle.strict import from_json
from tilewright.runtime.errors import BundleError

LIMITS = {"enum", "minimum", "maximum", "minItems", "pattern"}
PUBLISHED = Path(__file__).parents[3] / "docs" / "bundle.schema.json"


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == json_schema(), "write json_schema() to docs/bundle.schema.json"


def test_a_built_bundle_satisfies_it(hitoksr_tiny: Path) -> None:
    for name, schema in json.loads(PUBLISHED.read_text()).items():
        jsonschema.Draft202012Validator(schema).validate(json.loads((hitoksr_tiny / name).read_text()))


def test_the_published_schemas_are_valid_and_fit_a_bundle(packed_bundle):
    schemas = json_schema()
    assert set(schemas) == set(DOCUMENTS)
    for name, schema in schemas.items():
        assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
        jsonschema.Draft202012Validator.check_schema(schema)
        validator = jsonschema.Draft202012Validator(schema)
        document = json.loads((packed_bundle / name).read_text())
        validator.validate(document)
        assert not validator.is_valid(document | {"surprise": 1})
        assert not validator.is_valid([])
        for keys in REQUIRED[name]:
            lacking = copy.deepcopy(document)
            parent = lacking
            for key in keys[:-1]:
                parent = parent[key]
            del parent[keys[-1]]
            assert not validator.is_valid(lacking), keys


def test_the_published_schemas_say_the_default_of_all_that_may_be_left_out():
    for schema in json_schema().values():
        for name, definition in schema["$defs"].items():
            for key, value in definition["properties"].items():
                assert ("default" in value) != (key in definition["required"]), (name, key)
                if "default" in value:
                    whole = {**value, "$defs": schema["$defs"]}
                    jsonschema.Draft202012Validator(whole).validate(value["default"])
    assert json_schema()["program.json"]["$defs"]["Tiles"]["properties"]["batch"] == {
        "type": "integer",
        "minimum": 1,
        "default": 1,
    }


VALUES = (-1, 0, 1, 2, 3, 16, 17, 1000, 1001, 4096, 4097, 2**63, [], "", "none of these", "float32", "zeros", "a/b")


@pytest.mark.slow
def test_a_value_outside_the_limits_of_the_schema_is_refused_by_the_reader(packed_bundle):
    refused = set()
    for name, schema in json_schema().items():
        validator, document = jsonschema.Draft202012Validator(schema), json.loads((packed_bundle / name).read_text())
        for *keys, last in places(document):
            for value in VALUES:
                changed = copy.deepcopy(document)
                parent = changed
                for key in keys:
                    parent = parent[key]
                parent[last] = value
                errors = {error.validator for error in validator.iter_errors(changed)}
                if errors & LIMITS:
                    refused |= errors & LIMITS
                    with pytest.raises(BundleError):
                        from_json(DOCUMENTS[name], json.dumps(changed), name)
    assert refused == LIMITS


def places(document: object) -> Iterator[tuple[str | int, ...]]:
    """The keys to every value inside a document."""
    if isinstance(document, dict | list):
        for key, value in document.items() if isinstance(document, dict) else enumerate(document):
            yield (key,)
            yield from ((key, *rest) for rest in places(value))
