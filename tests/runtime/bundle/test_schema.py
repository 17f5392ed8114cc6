"""The published JSON Schema is the one the reader's dataclasses give."""

import json
from pathlib import Path

import jsonschema

from tilewright.runtime.bundle.read import json_schema

PUBLISHED = Path(__file__).parents[3] / "docs" / "bundle.schema.json"


def test_the_published_schema_is_current() -> None:
    assert json.loads(PUBLISHED.read_text()) == json_schema(), "write json_schema() to docs/bundle.schema.json"


def test_a_built_bundle_satisfies_it(hitoksr_tiny: Path) -> None:
    for name, schema in json.loads(PUBLISHED.read_text()).items():
        jsonschema.Draft202012Validator(schema).validate(json.loads((hitoksr_tiny / name).read_text()))
