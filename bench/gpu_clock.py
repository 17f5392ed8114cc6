"""Timing on a GPU: runs are CUDA graphs, the cache is flushed between them, and results name hardware and versions."""

import json
import platform
import statistics
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tilewright.kernels.jit import triton
from tilewright.kernels.sample import EIGHT_BIT
from tilewright.runtime.profile import hardware

Run = Callable[[], Any]
TOGETHER_MS = 50  # time of all runs of one turn


def captured(run: Run) -> Run:
    """The kernels of a run as one CUDA graph, so that launching them takes no time."""
    run()  # compiles
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


def times(run: Run, count: int) -> list[float]:
    """Milliseconds of each run. The cache is flushed before every run, which is not timed."""
    flush = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count + 1)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events[1:]]  # the first one warms up


def count(run: Run) -> int:
    """The number of runs in a turn."""
    return min(50, max(5, int(TOGETHER_MS / statistics.median(times(run, 3)))))


def copy_rate() -> float:
    """Bytes a second of a copy, counting reads and writes."""
    source = torch.randint(0, 127, (1 << 30,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (statistics.median(times(partial(target.copy_, source), 20)) / 1e3)


def product_rate(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product with sides of 8192."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda").to(dtype) for _ in range(2))
    run = partial(torch.mm, a, b)
    if dtype == EIGHT_BIT:
        one = torch.ones((), device="cuda")
        run = partial(torch._scaled_mm, a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)
    return 2 * n**3 / (statistics.median(times(run, 20)) / 1e3)


def difference(results: Any, expected: Any) -> float:
    """The share of different indices, or the relative error of numbers in the root of the mean square."""
    ours, reference = (value if isinstance(value, tuple) else (value,) for value in (results, expected))
    if ours[0].dtype == torch.int32:
        return (ours[0] != reference[0]).double().mean().item()
    pairs = [(a.double(), b.double()) for a, b in zip(ours, reference, strict=True)]
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def reason(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def store(folder: Path, name: str, result: Any) -> None:
    """Store a result with its hardware and versions."""
    gpu = torch.cuda.get_device_properties(0)
    chip = {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "gpu_memory_bytes": gpu.total_memory,
        "l2_bytes": gpu.L2_cache_size,
    }
    versions = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    record = {"hardware": hardware() | chip, "versions": versions, "python": platform.python_version()}
    record |= {"result": result, "when": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
