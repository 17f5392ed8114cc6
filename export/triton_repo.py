"""Writing a model repository for NVIDIA Triton Inference Server: one model, which restores with a bundle."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tilewright.export.new_folder import new_folder
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.execute.devices import cpu_names
from tilewright.runtime.triton_server import NOTES, RESTORED, inputs_of

__all__ = ["MODEL", "triton_repo"]

MODEL = "tilewright"
PACKED = "1/bundle"  # the folder of a copied bundle, inside of the model's
CODE = '''"""Restores images with the bundle that config.pbtxt names."""

from tilewright.runtime.triton_server import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


def triton_repo(
    root: Path,
    out: Path,
    *,
    pack: bool = False,
    devices: Sequence[str] = ("cpu:0",),
    weights_dir: Path | None = None,
    expect: str | None = None,
    on_bytes: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a folder with the model `tilewright`; with `pack` it holds a copy of the bundle and of the weights."""
    bundle, out = read_bundle(root, expect=expect), out.resolve()
    names = {r.folder for tensors in bundle.weights.tensors.values() for r in tensors.values()}
    folders = {name: bundle.folder(name, weights_dir) for name in sorted(names)}
    parameters = {
        "bundle": PACKED if pack else str(root.resolve()),
        "digest": bundle.digest,
        "devices": ",".join(cpu_names(devices)),
        "threads": "0",
        "memory": "fast",
    }
    if weights_dir and not pack:
        parameters["weights_dir"] = str(weights_dir.resolve())
    files = _files(bundle, folders) if pack else {}
    size = sum(file.stat().st_size for file in files.values())
    with new_folder(out, size) as folder:
        model = folder / MODEL
        (model / "1").mkdir(parents=True)
        (model / "1" / "model.py").write_text(CODE)
        (model / "config.pbtxt").write_text(_config(bundle, parameters), encoding="utf-8")
        _copy(files, model / PACKED, size, on_bytes)
    return {
        "folder": str(out),
        "model": MODEL,
        "inputs": [spec.name for spec in inputs_of(bundle.program, bundle.arguments)],
        "outputs": [RESTORED, NOTES],
        "copied_bytes": size,
    }


def _config(bundle: Bundle, parameters: Mapping[str, str]) -> str:
    """The text of config.pbtxt."""
    lines = [
        f"# {bundle.manifest.system} {bundle.manifest.preset}, written by `tilewright export triton-repo`",
        f'name: "{MODEL}"',
        'backend: "python"',
        "max_batch_size: 0 # a request is one image; the runtime gathers tiles, so dynamic batching is off",
        "model_transaction_policy { decoupled: false }",
        "instance_group [ { kind: KIND_CPU count: 1 } ] # one instance runs all devices",
    ]
    for spec in inputs_of(bundle.program, bundle.arguments):
        optional = " optional: true" if spec.optional else ""
        lines += [
            f"# {one_line(spec.help)}",
            f'input [ {{ name: "{spec.name}" data_type: {spec.type} dims: [ 1 ]{optional} }} ]',
        ]
    for name, text in (
        (RESTORED, "the bytes of a PNG file"),
        (NOTES, "notes on exceptions, such as smaller tiles; usually empty"),
    ):
        lines += [f"# {text}", f'output [ {{ name: "{name}" data_type: TYPE_STRING dims: [ 1 ] }} ]']
    lines.append("# options of the runtime; a path that is not absolute begins at this folder")
    for key, value in parameters.items():
        # a string of protobuf's text format: JSON escapes only what it understands too
        text = json.dumps(value, ensure_ascii=False)
        lines.append(f'parameters [ {{ key: "{key}" value {{ string_value: {text} }} }} ]')
    return "\n".join(lines) + "\n"


def _files(bundle: Bundle, folders: Mapping[str, Path]) -> dict[str, Path]:
    """Path in the copy -> every file of a bundle, and every file of its weights."""
    files = {f.relative_to(bundle.root).as_posix(): f for f in sorted(bundle.root.rglob("*")) if f.is_file()}
    for name, folder in folders.items():
        files |= {f"weights/{name}/{file}": folder / file for file in bundle.weights.folders[name].files}
    return files


def _copy(files: Mapping[str, Path], out: Path, total: int, report: Callable[[int, int], None]) -> None:
    done = 0
    for name, file in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out / name)
        done += file.stat().st_size
        report(done, total)
