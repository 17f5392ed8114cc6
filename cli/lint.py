"""The verb `tilewright export lint`: what a target would refuse in a bundle's graphs."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tilewright.cli.terminal import answer, expect_argument, table, verb

__all__ = ["add_lint"]


def add_lint(verbs: Any) -> None:
    """Add the verb to its group."""
    lint = verb(verbs, "lint", "find what a target would refuse in a bundle's graphs; exit 6 on a finding", _lint)
    lint.add_argument("bundle", type=Path, metavar="BUNDLE", help="its directory, or a folder that 'onnx' wrote")
    lint.add_argument("--target", choices=("tensorrt",), required=True, help="it need not be installed")
    expect_argument(lint)
    lint.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")


def _lint(arguments: argparse.Namespace) -> None:
    from tilewright.export.lint.lint import lint
    from tilewright.runtime.errors import BuildError

    report = lint(arguments.bundle, arguments.target, weights_dir=arguments.weights_dir, expect=arguments.expect)
    fault = None
    if report["findings"]:
        fault = BuildError(f"{arguments.bundle}: {report['summary']}; change the graphs as the last column says")
    answer(arguments, report, _text(report), fault=fault)


def _text(report: Mapping[str, Any]) -> str:
    """The report as text: a table of findings, equal ones in one row, or else all that was checked."""
    from tilewright.runtime.bundle.strict import one_line

    if report["findings"]:
        rows: dict[tuple[str, ...], list[str]] = {}  # a finding without its node -> its nodes
        for f in report["findings"]:
            rows.setdefault((f["graph"], f["op"], f["problem"], f["remedy"]), []).append(f["node"])
        heads = ["graph", "node", "operator", "what is wrong", "what to do"]
        cells = [[graph, _several(nodes), op, *texts] for (graph, op, *texts), nodes in rows.items()]
        return f"{table(heads, [[one_line(cell) for cell in row] for row in cells])}\n{report['summary']}"
    heads = ["graph", "nodes", "operators", "plugins", "functions", "weights outside", "of unknown shape"]
    counts = ("nodes", "operators", "plugins", "functions", "external", "unknown")
    cells = [[name, *(str(graph[count]) for count in counts)] for name, graph in report["graphs"].items()]
    return f"{table(heads, cells)}\nchecked: {', '.join(report['checked'])}\n{report['summary']}"


def _several(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"
