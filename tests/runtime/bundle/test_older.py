"""A bundle of an older schema is refused with the command that builds it again."""

import json
import shlex
import shutil
from pathlib import Path

import pytest

from support.forged import put, refusal
from tilewright.cli.main import main
from tilewright.runtime.bundle.read import read_bundle

RANDOM, LORA = "random, seed 7", "random, seed 7, but for lora"


def refused(root: Path, name: str, keys: tuple[str, ...], value: object) -> list[str]:
    """The words of the command in the refusal, after a change of one value."""
    put(root, name, keys, value)
    text = refusal(read_bundle, root)
    start = f"{root / 'bundle.json'}: schema 1 is too old, this version reads 2; run "
    assert text.startswith(start)
    return shlex.split(text.removeprefix(start))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "--preset standard --weights MODELS"),
        ({"preset": "files"}, "--weights MODELS"),
        ({"options": {"weights": "given", "packed": "yes"}}, "--preset standard --weights MODELS --pack"),
        ({"options": {"weights": RANDOM, "packed": "yes"}}, "--preset standard --random-weights 7"),
        ({"options": {"weights": LORA}}, "--preset standard --weights MODELS --random-weights 7"),
        ({"options": {"weights": RANDOM, "ops": "standard"}}, "--preset standard --random-weights 7 --ops standard"),
        ({"options": None, "weights": "nowhere.json", "preset": 3}, "--preset 3 --weights DIR"),
        ({"system": "a; rm b\n"}, "--preset standard --weights MODELS"),
    ],
)
def test_the_command_has_the_options_that_the_documents_tell(bundle, weights_dir, changes, words):
    document = json.loads((bundle / "bundle.json").read_text()) | changes
    (bundle / "bundle.json").write_text(json.dumps(document))
    command = refused(bundle, "bundle.json", ("schema_version",), 1)
    system = document["system"].replace("\n", "\\n")
    options = [str(weights_dir) if word == "MODELS" else word for word in words.split()]
    assert command == ["tilewright", "export", "build", system, *options, "-o", str(bundle)]


def test_weights_in_several_folders_are_asked_for_by_the_folder_that_holds_them(two_folder_bundle, tmp_path):
    root = two_folder_bundle()
    document = json.loads((root / "weights.json").read_text())
    for name, folder in document["folders"].items():
        folder["path"] = f"/data/flux/{name}"
    (root / "weights.json").write_text(json.dumps(document))
    command = refused(root, "bundle.json", ("schema_version",), 1)
    assert command[command.index("--weights") + 1] == "/data/flux"


@pytest.mark.slow
def test_the_command_builds_a_bundle_that_can_be_read(hitoksr_tiny, tmp_path):
    root = shutil.copytree(hitoksr_tiny, tmp_path / "b")
    command = refused(root, "bundle.json", ("schema_version",), 1)
    assert main(command[1:]) == 0
    assert read_bundle(root).digest == read_bundle(hitoksr_tiny).digest
