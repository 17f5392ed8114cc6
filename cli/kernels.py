"""The verbs of `tilewright kernels`: list ops, check their results and resources, and time them."""

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tilewright.cli.terminal import Progress, answer, table, verb
from tilewright.runtime.errors import AccuracyError, EnvironmentMismatch, UsageError

__all__ = ["add_verbs"]


def add_verbs(verbs: Any) -> None:
    """Add the verbs list, check and bench."""
    verb(verbs, "list", "ops, where they are used, and which implementations are here", _list)

    check = verb(
        verbs, "check", "compare every op with its reference in every implementation; exit 7 on a miss", _check
    )
    check.add_argument("--op", metavar="NAME", help="only this one")
    check.add_argument(
        "--resources",
        action="store_true",
        help="instead compile the kernels for every architecture: shared memory, spills, tensor cores",
    )

    bench = verb(verbs, "bench", "time native and Triton kernels against what they replace", _bench)
    bench.add_argument("--op", metavar="NAME", help="only this one")


def _ops(name: str | None) -> list[Any]:
    from tilewright.kernels.table import KERNELS

    if name is not None and name not in KERNELS:
        raise UsageError(f"--op {name!r} is no op; there are {', '.join(KERNELS)}")
    return [op for op in KERNELS.values() if name in (None, op.name)]


def _refuse_interpreter() -> None:
    from tilewright.kernels.jit import INTERPRETED

    if INTERPRETED:
        raise EnvironmentMismatch(
            "TRITON_INTERPRET=1 makes this process interpret kernels; unset it, interpreted ones run in a process of"
            " their own"
        )


def _list(arguments: argparse.Namespace) -> None:
    from tilewright.export.kernels_check import implementations

    report = implementations(_ops(None))
    rows = [[r["op"], ", ".join(r["cases"]), r["torch"], r["triton"], r["onnx"], r["native"]] for r in report["ops"]]
    heads = ["op", "published sizes", "torch", "triton", "onnx", "native"]
    below = [report["runtime"], f"TensorRT: {report['tensorrt']}", f"ONNX Runtime CUDA: {report['cuda']}"]
    answer(arguments, report, "\n".join([table(heads, rows), *below]))


def _check(arguments: argparse.Namespace) -> None:
    ops = _ops(arguments.op)
    _refuse_interpreter()
    (_check_resources if arguments.resources else _check_results)(arguments, ops)


def _check_results(arguments: argparse.Namespace, ops: Sequence[Any]) -> None:
    from tilewright.export.kernels_check import check

    with Progress(arguments) as progress:
        rows, absent = check(ops, progress.tiles)
    heads = ["op", "case", "implementation", "type", "error", "allowed", "equal indices", "verdict"]
    lines = []
    for row in rows:
        equal = "" if row.equal_indices is None else f"{row.equal_indices:.2%}"
        verdict = "ok" if row.passes else row.why or "MISS"
        numbers = _number(row.error), _number(row.allowed), equal
        lines.append([row.op, row.case, row.implementation, row.type, *numbers, verdict])
    text = "\n".join([table(heads, lines), *(f"not judged: {what}: {why}" for what, why in absent.items())])
    value = {
        "rows": [_finite(asdict(row) | {"passes": row.passes}) for row in rows],
        "not_judged": absent,
        "versions": _versions(),
    }
    fault = None
    if missed := [row for row in rows if not row.passes]:
        first = missed[0]
        why = first.why or f"off by {first.error:.1e}, {first.allowed:.1e} are allowed"
        fault = AccuracyError(
            f"{len(missed)} of {len(rows)} miss; first {first.op} in {first.implementation}, {first.type}: {why};"
            " do not use it with these versions"
        )
    answer(arguments, value, text, fault=fault)


def _check_resources(arguments: argparse.Namespace, ops: Sequence[Any]) -> None:
    from tilewright.export.kernels_check import GET_TRITON
    from tilewright.kernels.gate import GateRow, gate, gate_cases
    from tilewright.kernels.jit import triton

    if triton is None:
        raise EnvironmentMismatch(f"kernels are compiled by Triton: {GET_TRITON}")
    cases, rows = gate_cases(ops), list[GateRow]()
    with Progress(arguments) as progress:
        for done, case in enumerate(cases):
            progress.tiles("compiling", done, len(cases))
            rows += gate(*case)
    heads = ["op", "kernel", "case", "type", "arch", "registers", "shared", "spills", "tensor-core ops", "verdict"]
    lines = []
    for row in rows:
        numbers = ["-"] * 4 if row.resources is None else [str(n) for n in asdict(row.resources).values()]
        lines.append([row.op, row.kernel, row.case, row.type, row.arch, *numbers, "; ".join(row.faults) or "ok"])
    fault = None
    if missed := [row for row in rows if row.faults]:
        first = missed[0]
        fault = AccuracyError(
            f"{len(missed)} of {len(rows)} kernels may not ship; first {first.kernel} {first.case} {first.type}"
            f" {first.arch}: {'; '.join(first.faults)}; give it smaller tiles"
        )
    value = {"rows": [asdict(row) for row in rows], "versions": _versions()}
    answer(arguments, value, table(heads, lines), fault=fault)


def _bench(arguments: argparse.Namespace) -> None:
    from tilewright.export.kernels_bench import bench
    from tilewright.kernels.timing import RUNS
    from tilewright.runtime.profile import hardware

    ops = _ops(arguments.op)
    _refuse_interpreter()
    with Progress(arguments) as progress:
        rows = bench(ops, progress.tiles)
    machine = hardware() | _gpu()
    answered = {"rows": rows, "runs": RUNS, "hardware": machine, "versions": _versions()}
    lines = [[r["op"], r["case"], d, *_times(r[d])] for r in rows for d in ("cpu", "gpu")]
    heads = ["op", "case", "on", "ours", "against"]
    below = ", ".join(f"{what} {value}" for what, value in (machine | _versions()).items())
    answer(arguments, answered, f"{table(heads, lines)}\nmedians of {RUNS} interleaved runs; {below}")


def _times(times: dict[str, float] | str) -> list[str]:
    if isinstance(times, str):
        return [times, ""]
    (ours, seconds), *others = times.items()
    against = (f"{name} {1000 * s:.2f} ms ({s / seconds:.2f} x)" for name, s in others)
    return [f"{ours} {1000 * seconds:.2f} ms", ", ".join(against)]


def _gpu() -> dict[str, str]:
    import torch

    return {"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "triton", "onnx", "onnxruntime", "onnxruntime-gpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def _number(value: float) -> str:
    return f"{value:.1e}" if math.isfinite(value) else "-"


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """Replace infinities, which JSON lacks, by null."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
