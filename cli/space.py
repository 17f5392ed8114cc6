"""The verb `tilewright export space`."""

import argparse
from typing import Any

from tilewright.cli.terminal import answer, table
from tilewright.runtime.errors import amount

__all__ = ["space"]


def space(arguments: argparse.Namespace) -> None:
    """Print the bytes of each component and of each file."""
    from tilewright.export.space import space

    report = space(arguments.bundle, arguments.weights_dir, arguments.expect)
    answer(arguments, report, _text(report))


def _text(report: dict[str, Any]) -> str:
    components = [
        [name, *(amount(c[key]) for key in ("files", "weights", "elsewhere", "shared"))]
        for name, c in report["components"].items()
    ]
    files = [
        [name, amount(f["bytes"]), amount(f["read"]) if "read" in f else "", ", ".join(f["components"])]
        for name, f in report["files"].items()
    ]
    total = {name: amount(size) for name, size in report["bytes"].items()}
    return "\n".join(
        [
            table(["component", "own files", "weights it reads", "of them elsewhere", "of them shared"], components),
            "",
            table(["file", "size", "read by graphs", "components"], files),
            "",
            f"in the bundle: {total['in_bundle']}; weights elsewhere: {total['elsewhere']};"
            f" read by several components: {total['shared']}",
            f"a copy of the weights elsewhere (build --pack, onnx) would take {total['copy']}",
        ]
    )
