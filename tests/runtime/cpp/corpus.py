"""Writes what the fuzzer begins with: the programs and documents of the tests, and the files of bundles.

Usage: corpus.py FOLDER [BUNDLE ...]
"""

import copy
import json
import struct
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[2]


def changed(document: Any, changes: list[list[Any]]) -> Any:
    """A document with some of its values replaced or removed."""
    document = copy.deepcopy(document)
    for place, *value in changes:
        *path, last = [int(key) if str(key).isdigit() else key for key in place]
        item = document
        for key in path:
            item = item[key]
        if value:
            item[last] = value[0]
        else:
            del item[last]
    return document


def seeds(bundles: list[Path]) -> list[bytes]:
    """A letter that chooses the reader, and what the reader gets."""
    documents = json.loads((TESTS / "vectors" / "documents.json").read_text())
    wholes = {item["kind"]: item["document"] for item in documents if "document" in item}
    texts = [("m" if kind == "manifest" else "w", document) for kind, document in wholes.items()]
    for item in documents:
        if "changes" in item:
            letter = "m" if item["kind"] == "manifest" else "w"
            texts.append((letter, changed(wholes[item["kind"]], item["changes"])))
    for file in sorted((TESTS / "programs").glob("*.signatures.json")):
        program = json.loads(file.with_name(file.name.replace(".signatures", "")).read_text())
        texts += [("p", program), ("p", {"program": program, **json.loads(file.read_text())})]
    found = [letter.encode() + json.dumps(document).encode() for letter, document in texts]
    for item in json.loads((TESTS / "vectors" / "safetensors.json").read_text()):
        found.append(b"s" + struct.pack("<Q", item["length"]) + item["header"].encode() + bytes(64))
    found.append(b'gram"' + bytes(40))  # a field of an unknown kind, where no tensor has a location
    for bundle in bundles:
        letters = {"bundle.json": "m", "program.json": "p", "weights.json": "w"}
        found += [letter.encode() + (bundle / name).read_bytes() for name, letter in letters.items()]
        found += [b"g" + file.read_bytes() for file in bundle.glob("*.onnx")]
        found += [b"s" + file.read_bytes()[:4096] for file in bundle.glob("*.safetensors")]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds([Path(word) for word in sys.argv[2:]])):
        (folder / f"seed-{number}").write_bytes(seed)


if __name__ == "__main__":
    main()
