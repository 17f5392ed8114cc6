"""Write tests/vectors/: what the Python runtime computes and refuses, for implementations in other languages.

docs/conformance.md says what the files hold. Refused programs are those of the tests of runtime/bundle.
"""

import argparse
import hashlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from tilewright.runtime.bundle.manifest import Manifest, read_manifest
from tilewright.runtime.bundle.program import Program, Steps
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import encode, from_json
from tilewright.runtime.bundle.weights import Weights
from tilewright.runtime.errors import TilewrightError
from tilewright.runtime.execute.walk import layout
from tilewright.runtime.images.canvas import Enlarged, fill
from tilewright.runtime.images.color import recolored
from tilewright.runtime.images.on_disk import PixelFile
from tilewright.runtime.images.read import Picture
from tilewright.runtime.images.write import PictureOnDisk
from tilewright.runtime.plan.lower import moves
from tilewright.runtime.plan.noise import normal, philox4x32
from tilewright.runtime.plan.schedules import SCHEDULES
from tilewright.runtime.plan.tiles import moved, tile_plan, weights

ROOT = Path(__file__).parents[1]
TESTS = ROOT / "tests"
PROGRAMS = ("hitoksr", "in-token", "in-token-fixed", "vicr", "instantir", "toksr", "steered", "private")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=TESTS / "vectors")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in written().items():
        (folder / name).write_text(text)


def written() -> dict[str, str]:
    """The text of each file."""
    files = {
        "tiles.json": tiles(),
        "schedules.json": schedules(),
        "noise.json": noise(),
        "images.json": images(),
        "colors.json": colors(),
        "graphs.json": graphs(),
        "programs.json": programs(),
        "documents.json": documents(),
        "safetensors.json": safetensors(),
    }
    return {name: _text(cases) for name, cases in files.items()}


def _text(cases: Sequence[Mapping[str, Any]]) -> str:
    """One case a line, so that a difference shows the case."""
    return "[\n" + ",\n".join(json.dumps(case, sort_keys=True, allow_nan=False) for case in cases) + "\n]\n"


def _floats(numbers: Any) -> list[int]:
    """The bits of float32 numbers."""
    result: list[int] = np.ascontiguousarray(numbers, np.float32).view(np.uint32).ravel().tolist()
    return result


def _or_refused(case: dict[str, Any], compute: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    try:
        return case | dict(compute())
    except TilewrightError as error:
        return case | {"refused": str(error), "code": error.exit_code}


def tiles() -> list[dict[str, Any]]:
    """Tile plans, and the weights of their rows and columns; and plans whose tiles have moved."""
    sizes = [
        (64, 64, 64, 16, 8, 8),
        (200, 136, 64, 16, 8, 4),
        (640, 72, 128, 64, 8, 8),
        (96, 40, 64, 32, 8, 1),
        (30, 40, 64, 16, 8, 1),
        (64, 64, 64, 40, 8, 1),
        (64, 64, 64, 12, 8, 1),
        (64, 64, 0, 0, 8, 1),
        (64, 64, 64, 16, 0, 1),
        (64, 72, 64, 16, 8, 16),
        (8 * 10**6, 64, 64, 0, 8, 8),
    ]

    def planned(width: int, height: int, tile: int, overlap: int, multiple: int, px: int) -> dict[str, Any]:
        plan = tile_plan(width, height, tile, overlap, multiple)
        rows, columns = weights(plan, px)
        return {"plan": _plan(plan), "rows": [_floats(w) for w in rows], "columns": [_floats(w) for w in columns]}

    names = ("width", "height", "tile", "overlap", "multiple", "px")
    cases = [_or_refused(dict(zip(names, case, strict=True)), lambda case=case: planned(*case)) for case in sizes]  # type: ignore[misc]
    for size, seed, step in (
        ((640, 392, 128, 64, 8), 3, 0),
        ((640, 392, 128, 64, 8), 2**32 - 1, 7),
        ((72, 64, 64, 16, 8), 3, 1),
    ):
        named = dict(zip(names[:-1], size, strict=True)) | {"seed": seed, "step": step}
        cases.append(named | {"moved": _plan(moved(tile_plan(*size), size[-1], seed, step))})
    return cases


def _plan(plan: Any) -> dict[str, Any]:
    sides = [plan.height, plan.width, plan.tile_height, plan.tile_width, plan.overlap]
    return {"sides": sides, "tops": list(plan.tops), "lefts": list(plan.lefts)}


def schedules() -> list[dict[str, Any]]:
    """The tables of each schedule."""
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "spacing_offset": 1, "final_alpha": "first"}
    linear = {"betas": "linear", "beta_start": 0.0001, "beta_end": 0.02, "spacing_offset": 0, "final_alpha": "one"}
    scaled = {"betas": "scaled_linear", **usual}
    cases: list[tuple[str, int, int, dict[str, Any]]] = [
        *(("flow_shift", count, tokens, {}) for count in (1, 8, 28) for tokens in (1, 256, 1020, 16384)),
        ("flow_shift", 5, 4096, {"base_shift": 0.25, "max_shift": 2, "base_tokens": 64, "max_tokens": 1024}),
        ("flow_shift", 5, 100000, {"max_mu": 1.15}),
        ("flow_shift", 5, 1, {"min_mu": 0.5}),
        ("flow_shift", 5, 10**9, {}),
        ("flow_shift", 5, 0, {}),
        ("flow_shift", 5, 1, {"base_tokens": 64, "max_tokens": 64}),
        *(
            (name, count, 1, options)
            for name in ("ddim", "ddpm")
            for count in (1, 7, 30)
            for options in (linear, scaled)
        ),
        ("ddim", 1000, 1, linear | {"spacing_offset": 1}),
        ("ddim", 5, 1, linear | {"betas": "cosine"}),
        ("ddim", 5, 1, linear | {"final_alpha": "last"}),
        ("ddpm", 5, 1, linear | {"beta_end": 1.5}),
    ]

    def computed(name: str, count: int, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
        Steps(name, count, options=options)
        return {"tables": {key: _floats(table) for key, table in SCHEDULES[name](count, tokens, **options).items()}}

    return [
        _or_refused(
            {"schedule": {"schedule": name, "count": count, "options": options}, "tokens": tokens},
            lambda case=(name, count, tokens, options): computed(*case),  # type: ignore[misc]
        )
        for name, count, tokens, options in cases
    ]


def noise() -> list[dict[str, Any]]:
    """Words of the generator; normal values in full for small fields, and by a sum of 16 bits for a large one."""
    counters = [[0, 0, 0, 0], [2**32 - 1] * 4, [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [5, 7, 3, 29]]
    keys = [(0, 0), (2**32 - 1, 2**32 - 1), (0xA4093822, 0x299F31D0), (7, 12)]
    cases: list[dict[str, Any]] = [
        {"counter": c, "key": list(k), "words": philox4x32(np.array(c, np.uint32), k).tolist()}
        for c, k in zip(counters, keys, strict=True)
    ]
    names = ("seed", "region", "stream", "channels", "top", "left", "height", "width")
    for field in (
        (0, 0, 0, 2, 0, 0, 4, 5),
        (2**32 - 1, 3, 29, 3, 11, 70000, 3, 4),
        (7, 0, 1, 16, 96, 32, 64, 48),
        (-1, 0, 0, 1, 0, 0, 1, 1),
    ):
        case = dict(zip(names, field, strict=True))
        cases.append(_or_refused(case, lambda case=case: _field(normal(**case))))  # type: ignore[misc]
    return cases


def _field(field: Any) -> dict[str, Any]:
    if field.size <= 64:
        return {"values": _floats(field)}
    return {"sha256": hashlib.sha256(field.astype("<f4").tobytes()).hexdigest()}


def picture(width: int, height: int) -> Any:
    """A picture that any language can make: numbers of a formula, with edges and slopes."""
    y, x, c = np.ogrid[:height, :width, :3]
    return (((x * 37) ^ (y * 91)) + c * 53 + x * y // 3 & 255).astype(np.uint8)


def deep_picture(width: int, height: int) -> Any:
    """The same picture in 16 bits."""
    levels = picture(width, height).astype(np.uint16)
    return levels * 256 + levels * 7 % 256


def images() -> list[dict[str, Any]]:
    """Crops of enlarged and padded pictures, times 255; and rounding back to 8 bits."""
    cases: list[dict[str, Any]] = []
    for width, height, scale, multiple, least, crop in (
        (13, 9, 4, 8, 1, (0, 0, 40, 56)),
        (13, 9, 4, 8, 1, (8, 16, 24, 16)),
        (13, 9, 3, 16, 1, (16, 16, 16, 32)),
        (40, 33, 2, 8, 1, (32, 24, 24, 32)),
        (13, 9, 1, 8, 1, (0, 0, 16, 16)),
        (3, 2, 4, 8, 64, (0, 0, 64, 64)),
        (1, 1, 4, 8, 1, (0, 0, 8, 8)),
    ):
        enlarged = Enlarged(picture(width, height), scale, multiple, least)
        planes = enlarged.crop(*crop)
        eight = np.rint(planes * 255).astype(np.uint8)
        assert np.array_equal(eight.astype(np.float32) / np.float32(255), planes)
        cases.append(
            {
                "picture": [width, height],
                "scale": scale,
                "multiple": multiple,
                "least": least,
                "padded": list(enlarged.shape),
                "crop": list(crop),
                "row": eight[:, 0].tolist(),
                "sha256": hashlib.sha256(eight.tobytes()).hexdigest(),
            }
        )
    for width, height, scale, multiple, crop in (
        (13, 9, 4, 8, (0, 0, 40, 56)),
        (40, 33, 3, 8, (48, 24, 24, 40)),
        (13, 9, 1, 8, (0, 0, 16, 16)),
    ):
        planes = Enlarged(deep_picture(width, height), scale, multiple).crop(*crop)
        sizes = {"scale": scale, "multiple": multiple, "least": 1, "crop": list(crop)}
        digest = hashlib.sha256(planes.astype("<f4").tobytes()).hexdigest()
        cases.append({"deep": [width, height], **sizes, "row": _floats(planes[0, 0]), "sha256": digest})
    numbers = [
        0,
        -0.0,
        -1,
        2,
        0.5,
        1,
        1 / 255,
        0.49999 / 255,
        0.5 / 255,
        1.5 / 255,
        254.5 / 255,
        np.nan,
        np.inf,
        -np.inf,
    ]
    numbers += np.linspace(-0.1, 1.1, 60).tolist()
    planes = np.broadcast_to(np.array(numbers, np.float32), (3, 1, len(numbers)))
    rgb = np.zeros((1, len(numbers), 3), np.uint8)
    fill(rgb, 0, 0, planes)
    cases.append({"numbers": _floats(planes[0, 0]), "rounded": rgb[0, :, 0].tolist()})
    deep = np.zeros((1, len(numbers), 3), np.uint16)
    fill(deep, 0, 0, planes)
    cases.append({"numbers": _floats(planes[0, 0]), "rounded to 16 bits": deep[0, :, 0].tolist()})
    colours = picture(40, 8)
    grey = np.asarray(Image.fromarray(colours).convert("L"))
    cases.append({"colours": [40, 8], "grey": hashlib.sha256(grey.tobytes()).hexdigest()})
    like = Picture(None, None, grey=True, icc=None)
    file = PixelFile(None, (1, 1, 3), np.uint16, folder=Path(tempfile.gettempdir()))
    with file:
        deep_grey = PictureOnDisk(deep_picture(40, 8), like, 1, file).rows(0, 8).astype("<u2")
    cases.append({"deep colours": [40, 8], "grey": hashlib.sha256(deep_grey.tobytes()).hexdigest()})
    return cases


def colors() -> list[dict[str, Any]]:
    """Pictures that take the colours of their enlarged source. The restored picture is the same formula, reversed."""
    cases = []
    for width, height, scale in ((13, 9, 4), (40, 33, 1), (301, 3, 2), (1, 1, 4)):
        for source_bits, bits in ((8, 8), (8, 16), (16, 16)):
            source = (picture if source_bits == 8 else deep_picture)(width, height)
            restored = (picture if bits == 8 else deep_picture)(width * scale, height * scale)[::-1, ::-1]
            for color in ("wavelet", "adain"):
                result = recolored(color, restored, source, scale)[0 : height * scale, 0 : width * scale]
                case = {"picture": [width, height], "scale": scale, "source_bits": source_bits, "bits": bits}
                little = result.astype("<u2" if bits == 16 else np.uint8)
                digest = hashlib.sha256(little.tobytes()).hexdigest()
                cases.append(case | {"color": color, "row": result[0, :4].tolist(), "sha256": digest})
    return cases


def graphs() -> list[dict[str, Any]]:
    """The tile plans and the nodes of programs. A node is a line: pass, section, step, tile, and what it waits for."""
    cases = []
    for name in PROGRAMS:
        program = from_json(Program, (TESTS / "programs" / f"{name}.json").read_bytes(), name)
        px = max(p.tiles.px for p in program.passes if p.tiles)
        for height, width, tile in ((px, px, None), (2 * px, 3 * px, None), (px, 4 * px, px)):
            case = {"program": name, "height": height, "width": width, "tile": tile, "steps": 2}
            steps = 2 if any(p.steps for p in program.passes) else None
            cases.append(
                _or_refused(case | {"steps": steps}, lambda c=(program, height, width, tile, steps): _graph(*c))
            )  # type: ignore[misc]
        if any(moves(program, p) for p in program.passes):
            case = {"program": name, "height": 2 * px, "width": 3 * px, "tile": None, "steps": 2, "jitter": 5}
            cases.append(case | _graph(program, 2 * px, 3 * px, None, 2, 5))
    return cases


def _graph(
    program: Program, height: int, width: int, tile: int | None, steps: int | None, jitter: int | None = None
) -> dict[str, Any]:
    graph, _ = layout(program, height, width, tile, None, steps, jitter)
    lines = [
        f"{n.pass_name} {n.section} {n.step} {n.tile}:{''.join(f' {b}.{t}' for b, t in n.waits)}\n"
        for n in graph.nodes()
    ]
    return {
        "plans": {name: _plan(plan) for name, plan in graph.plans.items()},
        "nodes": len(lines),
        "last": lines[-1],
        "sha256": hashlib.sha256("".join(lines).encode()).hexdigest(),
    }


def programs() -> list[dict[str, Any]]:
    """Programs of tests/programs that can run, and changes of them that are refused. A change is a path and a value."""
    good = [{"program": name} for name in PROGRAMS]
    checks, reading, meaning = (
        _tests_of(f"runtime/bundle/{name}.py") for name in ("test_check", "test_program", "test_meaningless")
    )
    bad = [(name, changes, rest) for name, changes, *rest, _ in checks.UNRUNNABLE.values()]
    bad += [(name, changes, []) for name, changes, _ in meaning.MEANINGLESS.values()]
    bad += [("in-token", changes, []) for changes, _ in reading.MALFORMED.values()]
    documents = importlib.import_module("support.documents")
    cases: list[dict[str, Any]] = []
    for name, changes, rest in bad:
        around = [list(_changes(documents, rest[0]))] if rest else []
        case = {
            "program": name,
            "changes": list(_changes(documents, changes)),
            "signatures": around[0] if around else [],
        }
        refused = _or_refused(case, lambda c=(name, changes, *rest): documents.checked(*c) or {})  # type: ignore[misc]
        assert "refused" in refused, case
        cases.append(refused)
    return good + cases


def _changes(documents: ModuleType, changes: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Each change as its path, and its value if it has one."""
    import re

    for path, value in changes.items():
        keys = [key.replace("\\.", ".") for key in re.split(r"(?<!\\)\.", path)]
        yield [keys] if value is documents.GONE else [keys, value]


def _tests_of(path: str) -> ModuleType:
    """A module of the tests, for its tables of cases."""
    sys.path[:0] = [str(TESTS)]
    spec = importlib.util.spec_from_file_location(Path(path).stem, TESTS / path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(TESTS))
    return module


def documents() -> list[dict[str, Any]]:
    """Manifests and weights, and changes of them that are refused; texts that are no JSON."""
    manifest = _manifest()
    engine = "components.net.engines.0."
    reference = {"file": "w.safetensors", "dtype": "float32", "shape": [2], "offset": 8, "length": 8, "folder": "net"}
    table = {
        "folders": {"net": {"path": None, "files": {"w.safetensors": {"size": 16, "sha256": "0" * 64}}}},
        "tensors": {"net": {"bias": reference}},
    }
    changes: list[tuple[str, Any]] = [
        ("schema_version", 1.5),
        ("schema_version", True),
        ("schema_version", 3),
        ("system", 7),
        ("components", {}),
        ("components", []),
        ("unknown", 1),
        (f"{engine}backend", "ORT"),
        (f"{engine}backend", ""),
        (f"{engine}name", "ort_"),
        (f"{engine}device", "tpu"),
        (f"{engine}precision", "float64"),
        (f"{engine}files", []),
        (f"{engine}files", "net.onnx"),
        (f"{engine}needs", {"cores": 0}),
        (f"{engine}needs", {"packages": {"onnxruntime": "1.x"}}),
        (f"{engine}needs", {"compute_capability": [8]}),
        (f"{engine}profile", {"batch": {"least": 2, "most": 4}}),
        (f"{engine}profile", {"side_px": {"least": 9, "most": 4}}),
        (f"{engine}memory", {"fixed": -1}),
        (f"{engine}memory", {"copied": 0.5}),
        (f"{engine}form", {"inputs": "int4"}),
        ("components.net.engines", []),
        ("components.net.engines.1.name", "ort-float32"),
        ("components.net.inputs.image.dtype", "float31"),
        ("components.net.inputs.image.shape", ["batch", 0]),
        ("components.net.inputs.image.shape", ["batch", 1.0]),
        ("files.net\\.onnx.size", -1),
        ("files.net\\.onnx.size", "7"),
        ("arguments", {"gain": {"kind": "float"}}),
        ("arguments", {"gain": {"kind": "number", "default": []}}),
        ("tokenizers", {"a": "b"}),
        ("constants", 3),
        ("made_with", {"torch": None}),
    ]
    cases: list[dict[str, Any]] = [{"kind": "manifest", "document": manifest}, {"kind": "weights", "document": table}]
    cases += [_document("manifest", manifest, path, value) for path, value in changes]
    cases += [
        _document("weights", table, path, value)
        for path, value in (
            ("folders", None),
            ("folders.net.path", 1),
            ("tensors.net.bias.offset", -1),
            ("tensors.net.bias.length", -1),
            ("tensors.net.bias.shape", [2, "n"]),
            ("tensors.net.bias.more", 1),
        )
    ]
    texts = [
        "",
        "{",
        "[1,]",
        '{"a": 1,}',
        "{} {}",
        "nul",
        "01",
        "1.",
        ".5",
        "+1",
        "'a'",
        '"\\x"',
        '"a\nb"',
        "[" * 5000,
        "\x00",
    ]
    cases += [{"kind": "text", "text": text} for text in texts]
    cases.append(
        _or_refused(
            {"kind": "twice", "text": '{"a": 1, "a": 2}'},
            lambda: {"read": from_json(Manifest, '{"a": 1, "a": 2}', "bundle.json")},
        )
    )
    return cases


def _manifest() -> dict[str, Any]:
    image = {"dtype": "float32", "shape": ["batch", 3, "height", "width"]}
    engine = {"name": "ort-float32", "backend": "ort", "device": "cpu", "precision": "float32", "files": ["net.onnx"]}
    second = engine | {"name": "a"}
    component = {
        "graph": "net.onnx",
        "inputs": {"image": image},
        "outputs": {"out": image},
        "engines": [engine, second],
    }
    return {
        "schema_version": 2,
        "system": "net",
        "preset": "tiny",
        "licence": "CC0-1.0",
        "components": {"net": component},
        "files": {"net.onnx": {"size": 7, "sha256": "0" * 64}},
        "made_with": {"tilewright": "0.1.0"},
    }


def _document(kind: str, tree: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    sys.path[:0] = [str(TESTS)]
    documents = importlib.import_module("support.documents")
    sys.path.remove(str(TESTS))
    text = json.dumps(documents.changed(tree, {path: value})).encode()

    def read() -> Mapping[str, Any]:
        return {
            "read": encode(
                read_manifest(text, "bundle.json") if kind == "manifest" else from_json(Weights, text, "weights.json")
            )
        }

    case = _or_refused({"kind": kind, "changes": list(_changes(documents, {path: value}))}, read)
    assert "refused" in case, case
    return case


def safetensors() -> list[dict[str, Any]]:
    """Headers of files of 64 bytes of data, and whether they are read."""
    import tempfile

    good = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    headers: list[tuple[str, int | None]] = [
        (json.dumps(good), None),
        (json.dumps(good | {"__metadata__": {"format": "pt"}}), None),
        (json.dumps({"b": {"dtype": "BF16", "shape": [5], "data_offsets": [10, 20]}}), None),
        (json.dumps({"s": {"dtype": "I64", "shape": [], "data_offsets": [8, 16]}}), None),
        ("{}", None),
        ("[]", None),
        ("{", None),
        (json.dumps(good), 10**9),
        *(
            (json.dumps({"a": good["a"] | change}), None)
            for change in (
                {"dtype": "F31"},
                {"shape": [2, 2]},
                {"shape": [2, 3.0]},
                {"shape": [-2, -3]},
                {"data_offsets": [48, 72]},
                {"data_offsets": [24, 0]},
                {"data_offsets": [-8, 16]},
                {"data_offsets": [0]},
                {"shape": [2**40, 2**40]},
            )
        ),
    ]
    cases = []
    with tempfile.TemporaryDirectory() as folder:
        for text, length in headers:
            data = (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + bytes(64)
            path = Path(folder) / "a.safetensors"
            path.write_bytes(data)
            case = {"header": text, "length": len(text) if length is None else length}
            try:
                read = {
                    n: [s.dtype, list(s.shape), start, size] for n, (s, start, size) in safetensors_header(path).items()
                }
                cases.append(case | {"tensors": read})
            except TilewrightError:
                cases.append(case | {"refused": True})
    return cases


if __name__ == "__main__":
    main()
