"""The linter: every graph of a bundle, or of a folder of graphs, against every rule of a target."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from tilewright.export.lint import files, operators, quantized, restrictions, sizes, types
from tilewright.export.lint.graph import Complaint, Graph, Rule, name_of, prepared
from tilewright.export.lint.table import TABLE
from tilewright.kernels.face import DOMAIN
from tilewright.runtime.bundle.read import read_bundle
from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import BundleError, UsageError

__all__ = ["RULES", "Finding", "lint", "lint_graph", "lint_unweighted"]

SIZE = "size of the file"
PLACES = "places of weights"
RULES: dict[str, Rule] = {
    "versions of ONNX": files.versions,
    PLACES: files.places,
    "operators": operators.operators,
    "plugins": operators.plugins,
    "types": types.value_types,
    "types of operators": types.operator_types,
    "one type a node": types.mixed_types,
    "shapes": sizes.shapes,
    "sizes from data": sizes.sizes_from_data,
    "restrictions of operators": restrictions.restrictions,
    "quantization": quantized.quantize_linear,
    "fusion of quantized weights": quantized.weights_directly,
    "one quantized type": quantized.one_eight_bit_type,
    "quantized attention": quantized.attention_all_or_none,
}


@dataclass(frozen=True)
class Finding:
    """A place in a graph that the target would refuse, or would not run as it is meant."""

    graph: str
    node: str  # or the name of an input or weight, or nothing if it is about the whole graph
    op: str
    rule: str
    problem: str
    remedy: str


Linted = tuple[list[Finding], dict[str, int]]


def lint(root: Path, target: str, *, weights_dir: Path | None = None, expect: str | None = None) -> dict[str, Any]:
    """Check all graphs of a bundle, or of a folder with graphs; returns a report with all findings."""
    linted = {
        name: lint_graph(name, path, find) for name, (path, find) in _graphs(root, target, weights_dir, expect).items()
    }
    return {"bundle": str(root), "checked": [SIZE, *RULES]} | _report(linted, target)


def lint_unweighted(graphs: Iterable[tuple[str, ir.Model]], target: str) -> dict[str, Any]:
    """Check named graphs whose weights have no files; returns a report with all findings."""
    rules = {title: rule for title, rule in RULES.items() if title != PLACES}
    linted = {name: _judged(name, prepared(model, Path), rules) for name, model in graphs}
    return {"checked": [*rules]} | _report(linted, target)


def _report(linted: Mapping[str, Linted], target: str) -> dict[str, Any]:
    findings = [finding for of_graph, _ in linted.values() for finding in of_graph]
    faulty = len({finding.graph for finding in findings})
    count = f"{len(findings)} finding{'s' * (len(findings) > 1)} in {faulty} of {len(linted)} graphs"
    return {
        "target": target,
        "versions": list(TABLE.versions),
        "graphs": {name: counts for name, (_, counts) in linted.items()},
        "findings": [asdict(finding) for finding in findings],
        "summary": f"{count if findings else 'no findings'} for {TABLE.named}",
    }


def _graphs(
    root: Path, target: str, weights_dir: Path | None, expect: str | None
) -> dict[str, tuple[Path, Callable[[str], Path]]]:
    """Name -> the file of a graph, and a function from the location of external data to its file."""
    loose = [root] if root.suffix == ".onnx" and root.is_file() else sorted(root.glob("*.onnx"))
    if not (root / "bundle.json").is_file() and loose:
        if expect or weights_dir:
            raise UsageError(f"{root} is no bundle; --expect and --weights-dir are for bundles, leave them out")
        return {path.stem: (path, path.parent.joinpath) for path in loose}
    bundle = read_bundle(root, expect=expect)
    graphs = {}
    for name, component in sorted(bundle.manifest.components.items()):
        places = bundle.files_of(name, weights_dir)
        graphs[name] = bundle.path(component.graph), _finder(places, root)
        for engine in component.engines:
            own = [file for file in engine.files if file.endswith(".onnx") and file != component.graph]
            if engine.backend == target and own:
                places = bundle.files_of(engine.weights or name, weights_dir)
                graphs[f"{name} {engine.name}"] = bundle.path(own[0]), _finder(places, root)
    return graphs


def _finder(places: Mapping[str, Path], root: Path) -> Callable[[str], Path]:
    return lambda location: places.get(location, root / location)


def lint_graph(name: str, path: Path, find: Callable[[str], Path]) -> Linted:
    """Check the graph in a file; returns its findings, and the numbers of all that was checked."""
    if large := files.too_large(path.stat().st_size):
        return [_finding(name, SIZE, large)], {}
    try:
        graph = prepared(ir.load(path), find)
    except Exception as error:  # the readers' exceptions share no base class
        raise BundleError(f"{path}: not an ONNX graph ({one_line(str(error))}); export it again") from error
    return _judged(name, graph, RULES)


def _judged(name: str, graph: Graph, rules: Mapping[str, Rule]) -> Linted:
    findings = [_finding(name, title, complaint) for title, rule in rules.items() for complaint in rule(graph)]
    return findings, dict(_counts(graph))


def _finding(graph: str, rule: str, complaint: Complaint) -> Finding:
    node, op = ("", "") if complaint.node is None else name_of(complaint.node)
    return Finding(graph, node or complaint.value, op, rule, complaint.problem, complaint.remedy)


def _counts(graph: Graph) -> Iterator[tuple[str, int]]:
    weights = [value.const_value for value in graph.model.graph.initializers.values()]
    yield "nodes", len(graph.nodes)
    yield "operators", len({(node.domain, node.op_type) for node in graph.nodes})
    yield "plugins", sum(node.domain == DOMAIN for node in graph.nodes)
    yield "functions", len(graph.functions)
    yield "external", sum(isinstance(tensor, ir.ExternalTensor) for tensor in weights)
    results = [value for node in graph.nodes for value in node.outputs]
    yield "unknown", sum(value.dtype is None or value.shape is None for value in results)
