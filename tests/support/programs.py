"""The programs under tests/programs, which tests of the runtime read and systems must make."""

import json
from pathlib import Path

from tilewright.export.system import Settings, System
from tilewright.runtime.bundle.program import Program, Signature
from tilewright.runtime.bundle.strict import encode, from_json

__all__ = ["assert_stored"]

PROGRAMS = Path(__file__).parents[1] / "programs"


def assert_stored(name: str, system: System, settings: Settings) -> None:
    """A stored program and its signatures are those that a system makes."""
    text = (PROGRAMS / f"{name}.json").read_text()
    assert from_json(Program, text, name) == system.program(settings)
    signatures = {n: Signature(c.inputs, c.outputs) for n, c in system.components(settings).items()}
    stored = json.loads((PROGRAMS / f"{name}.signatures.json").read_text())["components"]
    assert stored == json.loads(json.dumps(encode(signatures)))
