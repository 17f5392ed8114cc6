"""Every op on a GPU, compared with plain PyTorch, eager and compiled, and with the limits of the chip.

Times are of the device: a contender is captured in a CUDA graph and replayed, the L2 cache is flushed before every run,
and contenders take turns in every round. `called_ms` is the time of a plain call, with its launches by the CPU. The
roofline is the longer of two times: all inputs and outputs once at the rate of a copy, and all operations at the rate
of a matrix product, both measured in the same process. Prints a table, stores JSON after every row, and exits with 4
without a GPU.
"""

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gpu_clock import captured, copy_rate, count, difference, product_rate, reason, store, times
from gpu_peers import contenders
from gpu_tiles import tune
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tilewright.kernels.jit import triton
from tilewright.kernels.sample import EIGHT_BIT, Sample, sample, type_name
from tilewright.kernels.table import KERNELS

TYPES = {type_name(dtype): dtype for dtype in (torch.bfloat16, torch.float16, EIGHT_BIT)}
TARGETS = {  # op -> contender -> how many times as fast our kernel must be
    "codebook_from_hidden": {"eager": 2.5, "compiled": 1.5},
    "concat_project": {"eager": 1.3},
    "joint_attention": {"sdpa, joined before": 0.95, "eager": 1.1},
    "qkv_norm_rope": {"eager": 1.5},
}


def operations(call: Sample) -> int:
    """The operations of a call's matrix products."""
    name, arguments = call.op.name, call.arguments
    x, last = arguments[0], arguments[-1]
    if name == "concat_project":
        return 2 * x.shape[0] * x.shape[1] * arguments[2].shape[0] * (x.shape[2] + arguments[1].shape[2])
    if name == "qkv_norm_rope":
        return 6 * x.numel() * arguments[2].shape[0]
    if name == "joint_attention":
        return attention(x, last.shape[2])
    if name == "in_token_attention":
        tokens, dim = x.shape[0] * x.shape[1], arguments[2][0].shape[0]
        projected = 2 * tokens * dim * (x.shape[2] + arguments[1].shape[2]) + 6 * tokens * dim * dim
        return projected + attention(last[0], x.shape[1])
    if name == "codebook_from_logits":
        return 0
    groups, size, width = last.shape
    return 2 * x.shape[0] * groups * size * (width if name == "codebook_nearest" else x.shape[1])


def attention(text: Tensor, image: int) -> int:
    """The operations of attention over the tokens of a text [B, H, T, D] and an image."""
    batch, heads, tokens, width = text.shape
    return 4 * batch * heads * (tokens + image) ** 2 * width


def moved(call: Sample, results: Any) -> int:
    """The bytes of a call: every input that is read, and every output, once."""
    tensors = [t for t in tree_leaves((call.arguments, call.options, results)) if isinstance(t, Tensor)]
    unread = 0
    if call.op.name in ("concat_project", "in_token_attention"):
        x, c, weight = call.arguments[:3]
        weight = weight if isinstance(weight, Tensor) else weight[0]
        unread = weight[:, x.shape[-1] + c.shape[-1] :].nbytes
    return sum(t.nbytes for t in tensors) - unread


def row(call: Sample, rates: dict[str, float], rounds: int, *, compile: bool) -> dict[str, Any]:
    """All contenders of one call. If one fails, its reason is stored and the others run."""
    runs = contenders(call, compile=compile)
    replays, failed = {}, {}
    for name, run in runs.items():
        try:
            replays[name] = captured(run)
        except Exception as error:  # whatever compilers and libraries raise
            failed[name] = reason(error)
    report: dict[str, Any] = {"op": call.op.name, "case": call.case, "type": type_name(call.dtype), "failed": failed}
    if "ours" in failed:
        return report
    result = runs["ours"]()
    if "eager" in replays:
        report["difference_from_eager"] = difference(result, runs["eager"]())
    counts = {name: count(replay) for name, replay in replays.items()}
    turns = [{name: times(replay, counts[name]) for name, replay in replays.items()} for _ in range(rounds)]
    for name in replays:
        ratios = [statistics.median(turn[name]) / statistics.median(turn["ours"]) for turn in turns]
        report[name] = {
            "ms": statistics.median(itertools.chain.from_iterable(turn[name] for turn in turns)),
            "min_ms": min(min(turn[name]) for turn in turns),
            "called_ms": statistics.median(times(runs[name], counts[name])),
            "ours_is_faster": statistics.median(ratios),
            "rounds": [min(ratios), max(ratios)],
        }
    by = {
        "operations": 1e3 * operations(call) / rates[f"{report['type']} operations"],
        "bytes": 1e3 * moved(call, result) / rates["bytes"],
    }
    report["bound_by"] = max(by, key=lambda what: by[what])
    report["roofline_ms"] = by[report["bound_by"]]
    report["of_roofline"] = report["roofline_ms"] / report["ours"]["ms"]
    report["targets"] = {
        name: {"at_least": least, "reached": report[name]["ours_is_faster"] >= least}
        for name, least in TARGETS.get(call.op.name, {}).items()
        if name in replays
    }
    return report


HEAD = f"{'op':21}{'case':13}{'type':14}{'ours ms':>8}{'eager':>8}{'compil.':>8}{'x eager':>8}{'x comp.':>8}{'roof':>6}"


def line(report: dict[str, Any]) -> str:
    """A row of the printed table."""
    text = f"{report['op']:21}{report['case']:13}{report['type']:14}"
    if "ours" in report["failed"]:
        return f"{text}  FAILED {report['failed']['ours']}"
    for names, key in ((("ours", "eager", "compiled"), "ms"), (("eager", "compiled"), "ours_is_faster")):
        digits = 3 if key == "ms" else 2
        text += "".join(f"{report[name][key]:8.{digits}f}" if name in report else f"{'-':>8}" for name in names)
    text += f"{report['of_roofline']:6.0%}"
    for name, target in report["targets"].items():
        reached = "reached" if target["reached"] else "MISSED"
        text += f"  {report[name]['ours_is_faster']:.2f}x {name}, {target['at_least']}x {reached}"
    apart = report.get("difference_from_eager", 0)
    if not apart < (0.2 if report["op"].startswith("codebook_") else 0.02):  # eager rounds logits to the short type
        text += f"  DIFFERS from eager by {apart:.1e}"
    return text + "".join(f"  {name} FAILED {why[:80]}" for name, why in report["failed"].items())


def calls(names: list[str], types: list[str]) -> Iterator[Sample]:
    """Calls at the published sizes in each type, made one by one."""
    for name, type in itertools.product(names, types):
        op, dtype = KERNELS[name], TYPES[type]
        if dtype != EIGHT_BIT or (op.eight_bit and torch.cuda.get_device_capability() >= (8, 9)):
            yield from (sample(op, case, dtype, "cuda") for case in op.cases if case != "small")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ops", nargs="*", help=f"some of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["bfloat16", type_name(EIGHT_BIT)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes")
    parser.add_argument("--tune", action="store_true", help="time every tile of a small grid instead")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results", help="a folder for the JSON")
    arguments = parser.parse_args()
    if unknown := set(arguments.ops) - set(KERNELS):
        parser.error(f"no op is called {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    if triton is None or not torch.cuda.is_available():
        print("kernels are timed on a CUDA GPU and with Triton; one of them is not here", file=sys.stderr)
        return 4
    names = arguments.ops or list(KERNELS)
    if arguments.tune:
        major, minor = torch.cuda.get_device_capability()
        tune([c for c in calls(names, arguments.types) if c.op.kernel_launches], 10 * major + minor, arguments.output)
        return 0
    rates = {"bytes": copy_rate()}
    rates |= {f"{type} operations": product_rate(TYPES[type]) for type in arguments.types}
    print(", ".join(f"{rate / 1e12:.2f} T {what}/s" for what, rate in rates.items()))
    print(HEAD, flush=True)
    rows = []
    for call in calls(names, arguments.types):
        with torch.no_grad():
            rows.append(row(call, rates, arguments.rounds, compile=not arguments.no_compile))
        print(line(rows[-1]), flush=True)
        store(arguments.output, "gpu_kernels", {"rates": rates, "rounds": arguments.rounds, "rows": rows})
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
