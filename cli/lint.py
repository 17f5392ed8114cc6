"""The verb `tilewright export lint`: what a target would refuse in the graphs of a bundle or of a system."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tilewright.cli.terminal import Progress, answer, expect_argument, table, verb

__all__ = ["add_lint"]

PRECISIONS = ("float32", "bfloat16", "fp8", "int8")


def add_lint(verbs: Any) -> None:
    """Add the verb to its group."""
    lint = verb(verbs, "lint", "find what a target would refuse in graphs; exit 6 on a finding", _lint)
    lint.add_argument(
        "bundle",
        type=Path,
        metavar="BUNDLE",
        help="its directory, a folder that 'onnx' wrote, or with --preset the name of a system",
    )
    lint.add_argument("--target", choices=("tensorrt",), required=True, help="it need not be installed")
    lint.add_argument("--preset", metavar="NAME", help="check the graphs of a system in these sizes, without weights")
    lint.add_argument(
        "--precision",
        type=lambda text: tuple(text.split(",")),
        metavar="NAMES",
        help=f"with --preset: of {', '.join(PRECISIONS)} (default: float32)",
    )
    expect_argument(lint)
    lint.add_argument("--weights-dir", type=Path, metavar="DIR", help="where the weights are, if they moved")


def _lint(arguments: argparse.Namespace) -> None:
    from tilewright.export.lint.lint import lint, lint_unweighted
    from tilewright.runtime.errors import BuildError, UsageError

    if arguments.preset is None:
        if arguments.precision:
            raise UsageError("--precision is for a system with --preset; a bundle has the graphs of its engines")
        report = lint(arguments.bundle, arguments.target, weights_dir=arguments.weights_dir, expect=arguments.expect)
    else:
        if arguments.expect or arguments.weights_dir:
            raise UsageError("--expect and --weights-dir are for bundles; leave them out, or leave out --preset")
        precisions = arguments.precision or PRECISIONS[:1]
        if unknown := [name for name in precisions if name not in PRECISIONS]:
            raise UsageError(f"--precision {unknown[0]!r} is not one of {', '.join(PRECISIONS)}")
        system = str(arguments.bundle)
        with Progress(arguments) as progress:
            graphs = _typed(system, arguments.preset, arguments.target, precisions, progress)
            report = {"system": system, "preset": arguments.preset} | lint_unweighted(graphs, arguments.target)
    fault = None
    if report["findings"]:
        fault = BuildError(f"{arguments.bundle}: {report['summary']}; change the graphs as the last column says")
    answer(arguments, report, _text(report), fault=fault)


def _typed(
    system: str, preset: str, target: str, precisions: tuple[str, ...], progress: Progress
) -> Iterator[tuple[str, Any]]:
    """The name and the graph of every component of a system, in each precision."""
    from tilewright.calib.unweighted import in_eight_bits
    from tilewright.export.targets import target_module
    from tilewright.export.unweighted import portable_graphs

    module = target_module(target)
    progress.doing("tracing")
    for component, model in portable_graphs(system, preset):
        for precision in precisions:
            name = f"{component} {precision}"
            progress.doing(f"checking {name}")
            copy, rest = model.clone(), precision
            if forms := module.FORMS.get(precision):
                copy, rest = in_eight_bits(component, copy, precision, forms[0]), forms[0].rest
            module.typed(copy, rest)
            module.prepare(copy)
            yield name, copy
            progress.doing("tracing")


def _text(report: Mapping[str, Any]) -> str:
    """The report as text: a table of findings, equal ones in one row, or else all that was checked."""
    from tilewright.runtime.bundle.strict import one_line

    if report["findings"]:
        rows: dict[tuple[str, ...], list[str]] = {}  # a finding without its node -> its nodes
        for f in report["findings"]:
            rows.setdefault((f["graph"], f["op"], f["problem"], f["remedy"]), []).append(f["node"])
        heads = ["graph", "node or value", "operator", "what is wrong", "what to do"]
        cells = [[graph, _several(nodes), op, *texts] for (graph, op, *texts), nodes in rows.items()]
        return f"{table(heads, [[one_line(cell) for cell in row] for row in cells])}\n{report['summary']}"
    heads = ["graph", "nodes", "operators", "plugins", "functions", "weights outside", "of unknown shape"]
    counts = ("nodes", "operators", "plugins", "functions", "external", "unknown")
    cells = [[name, *(str(graph[count]) for count in counts)] for name, graph in report["graphs"].items()]
    return f"{table(heads, cells)}\nchecked: {', '.join(report['checked'])}\n{report['summary']}"


def _several(nodes: list[str]) -> str:
    return nodes[0] if len(nodes) == 1 else f"{nodes[0]} and {len(nodes) - 1} more"
