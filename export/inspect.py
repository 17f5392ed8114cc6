"""Describing a bundle: its components, and the place of every byte of its weights."""

import json
from pathlib import Path
from typing import Any

from tilewright.runtime.bundle.arguments import Argument, flag
from tilewright.runtime.bundle.measured import measurements
from tilewright.runtime.bundle.program import Program
from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.bundle.weights import checked_folder

__all__ = ["inspect", "summary"]


def inspect(root: Path, weights_dir: Path | None = None, expect: str | None = None) -> dict[str, Any]:
    """A report on components, program, files and the bytes of weights: referenced, materialised, orphaned."""
    import onnx_ir as ir

    bundle = read_bundle(root, expect=expect)
    checked_folder(weights_dir)
    components = {}
    referenced = materialised = 0
    for name, component in sorted(bundle.manifest.components.items()):
        model = ir.load(bundle.path(component.graph))
        tensors = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
        outside = sum(t.nbytes for t in tensors if isinstance(t, ir.ExternalTensor))
        inside = sum(t.nbytes for t in tensors if not isinstance(t, ir.ExternalTensor))
        referenced, materialised = referenced + outside, materialised + inside
        folders = [bundle.folder(folder, weights_dir) for folder in bundle.weights.folders_of(name)]
        components[name] = {
            "inputs": {k: f"{s.dtype} {list(s.shape)}" for k, s in component.inputs.items()},
            "outputs": {k: f"{s.dtype} {list(s.shape)}" for k, s in component.outputs.items()},
            "engines": [encode(e) for e in component.engines],
            "nodes": model.graph.num_nodes(),
            "referenced_bytes": outside,
            "materialised_bytes": inside,
            "weights": [str(folder) for folder in folders],
        }
    manifest = bundle.manifest
    return {
        "bundle": str(root),
        "digest": bundle.digest,
        "system": manifest.system,
        "preset": manifest.preset,
        "licence": manifest.licence,
        "options": manifest.options,
        "made_with": manifest.made_with,
        "arguments": {name: encode(argument) for name, argument in bundle.arguments.items()},
        "components": components,
        "measured": encode(measurements(root))["measurements"],
        "passes": _passes(bundle.program),
        "tensors": _accounts(root),
        "bytes": {
            "graphs": sum(f.size for name, f in manifest.files.items() if name.endswith(".onnx")),
            "referenced": referenced,
            "materialised": materialised,
            "packed": sum(f.stat().st_size for f in (root / "weights").rglob("*") if f.is_file()),
            "orphaned": _orphaned(bundle),
        },
    }


def _accounts(root: Path) -> dict[str, Any]:
    """For each folder of weights, how many tensors are read by graphs, used at build only, or not read."""
    path = root / "reports" / "weights.json"
    accounts: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return accounts


def _passes(program: Program) -> list[str]:
    return [
        f"{p.name}: "
        + (f"tiles of {p.tiles.px} px, overlap {p.tiles.overlap_px}" if p.tiles else "whole")
        + (f", {p.steps.count} steps of {p.steps.schedule}" if p.steps else "")
        for p in program.passes
    ]


def _argument(name: str, argument: Argument) -> str:
    return f"argument {flag(name)}: {argument.takes} ({argument.otherwise})" + (argument.help and f"; {argument.help}")


def _orphaned(bundle: Bundle) -> int:
    """Bytes of packed weight files that no component reads, without headers."""
    orphaned = 0
    for name, folder in bundle.weights.folders.items():
        packed = bundle.root / "weights" / name
        for file in packed.rglob("*.safetensors"):
            relative = file.relative_to(packed).as_posix()
            read_by = {
                (r.offset, r.offset + r.length)
                for tensors in bundle.weights.tensors.values()
                for r in tensors.values()
                if r.folder == name and r.file == relative
            }
            data = end = min((start for start, _ in read_by), default=0)
            orphaned += file.stat().st_size - data
            for start, stop in sorted(read_by):
                orphaned -= max(0, stop - max(start, end))
                end = max(end, stop)
            if relative not in folder.files:
                orphaned += data
    return orphaned


def summary(report: dict[str, Any]) -> str:
    """The description as text."""
    sizes = report["bytes"]
    lines = [
        f"{report['bundle']}: {report['system']} {report['preset']}, {report['digest'][:12]}",
        f"licence of the weights: {report['licence']}",
        *(f"pass {p}" for p in report["passes"]),
        *(_argument(name, Argument(**fields)) for name, fields in report["arguments"].items()),
    ]
    for name, c in report["components"].items():
        lines.append(f"{name}: {c['nodes']} nodes; engines {', '.join(e['name'] for e in c['engines'])}")
        lines.append(f"    in  {', '.join(f'{k} {v}' for k, v in c['inputs'].items())}")
        lines.append(f"    out {', '.join(f'{k} {v}' for k, v in c['outputs'].items())}")
        if c["weights"]:
            lines.append(f"    {c['referenced_bytes']:,} bytes referenced in {', '.join(c['weights'])}")
        lines.append(f"    {c['materialised_bytes']:,} bytes in the graph")
    for m in report["measured"]:
        lines.append(f"measured on {m['processor']}, {m['threads']} thread(s), {', '.join(m['versions'].values())}:")
        lines += [
            f"    {name} {engine}: {v['seconds_per_megapixel']:.3g} s a megapixel, error {v['relative_l2']:.1e}"
            for name, engines in m["components"].items()
            for engine, v in engines.items()
        ]
    for origin, a in report["tensors"].items():
        lines.append(
            f"{origin}: {a['tensors']} tensors; {a['referenced']} referenced, {a['precomputed']} precomputed,"
            f" {a['merged']} merged, {a['ignored']} not read"
        )
    lines.append(f"bytes: {'; '.join(f'{kind} {size:,}' for kind, size in sizes.items())}")
    return "\n".join(lines)
