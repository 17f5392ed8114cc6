"""Finding the fastest tile of each kernel on this GPU, by timing a small grid of block sizes, warps and stages."""

import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gpu_clock import captured, count, difference, reason, store, times
from torch import Tensor

from tilewright.kernels.jit import Launch, ceil_div, triton
from tilewright.kernels.sample import Sample, sample, type_name
from tilewright.kernels.table import KERNELS

SPACES: dict[str, dict[str, tuple[int, ...]]] = {
    "concat_project": {"BLOCK_M": (64, 128), "BLOCK_O": (64, 128, 256), "BLOCK_K": (32, 64), "stages": (2, 3)},
    "qkv_norm_rope": {"BLOCK_M": (64, 128), "BLOCK_O": (64, 128, 256), "BLOCK_K": (64, 128), "stages": (2, 3, 4)},
    "joint_attention": {"BLOCK_M": (64, 128), "BLOCK_N": (32, 64, 128), "stages": (2, 3, 4)},
    "codebook_nearest": {"BLOCK_M": (32, 64, 128), "BLOCK_K": (64, 128, 256), "stages": (1, 2, 3)},
    "codebook_from_logits": {"BLOCK_M": (2, 4, 8, 16), "BLOCK_K": (256, 512, 1024), "stages": (2, 3, 4)},
    "codebook_from_hidden": {"BLOCK_M": (64, 128), "BLOCK_K": (64, 128, 256), "BLOCK_C": (64, 128), "stages": (3, 4)},
}
WARPS = (4, 8)
Tile = tuple[dict[str, Any], list[Launch], Any]  # its settings, the launches, and the tensors that they fill


def tiles(call: Sample, arch: int) -> Iterator[Tile]:
    """The tile that ships, then all others."""
    assert call.op.kernel_launches is not None
    launches_for = partial(call.op.kernel_launches, *call.arguments, **call.options, arch=arch)
    launches, results = launches_for()
    yield {"shipped": True}, launches, results
    candidates: list[Tile] = [({}, launches, results)]
    if call.op.name == "codebook_from_hidden":
        usual = launches[0].grid[2]
        candidates = [({"shares": n}, *launches_for(shares=n)) for n in sorted({max(1, usual // 2), usual, 2 * usual})]
    space = SPACES[call.op.name]
    for (shared, (first, *rest), results), warps in itertools.product(candidates, WARPS):
        for values in itertools.product(*space.values()):
            tile = dict(zip(space, values, strict=True)) | {"warps": warps}
            launch = tiled(call.op.name, first, **tile)
            if launch is not None:
                yield tile | shared, [launch, *rest], results


def tiled(name: str, launch: Launch, *, warps: int, stages: int, **blocks: int) -> Launch | None:
    """The launch with other blocks; none if the blocks do not divide the sizes."""
    constants, arguments = launch.constants | blocks, launch.arguments
    lengths = ("T", "N") if name == "joint_attention" else ("ROWS",)
    rows = sum(ceil_div(arguments[length], blocks["BLOCK_M"]) for length in lengths)
    grid = (rows, *launch.grid[1:])
    if name == "concat_project":
        grid = (rows, ceil_div(constants["OUT"], blocks["BLOCK_O"]))
    if name == "qkv_norm_rope":
        out = constants["HEADS"] * constants["D"]
        if blocks["BLOCK_O"] % constants["D"] or out % blocks["BLOCK_O"]:
            return None
        grid = (rows, 3 * out // blocks["BLOCK_O"])
    if name == "codebook_from_hidden":
        share = ceil_div(constants["K"], launch.grid[2])
        constants["SHARE"] = ceil_div(share, blocks["BLOCK_K"]) * blocks["BLOCK_K"]
    return replace(launch, constants=constants, grid=grid, warps=warps, stages=stages)


def compiled(name: str, case: str, dtype: Any, arch: int, place: int) -> str | None:
    """Fill Triton's cache in another process; returns the reason if a kernel does not compile."""
    _, launches, _ = next(itertools.islice(tiles(sample(KERNELS[name], case, dtype, "meta"), arch), place, None))
    try:
        for launch in launches:
            arguments = {
                key: triton.runtime.jit.MockTensor(value.dtype) if isinstance(value, Tensor) else value
                for key, value in launch.arguments.items()
            }
            options = {"num_warps": launch.warps, "num_stages": launch.stages, "grid": launch.grid}
            launch.kernel.warmup(**arguments, **launch.constants, **options)
    except Exception as error:  # Triton's, LLVM's and the assembler's share no base class
        return reason(error)
    return None


def timed(tile: Tile, expected: Any) -> dict[str, Any]:
    """The milliseconds and resources of a tile, or the reason why it does not run."""
    about, launches, results = tile
    for result in results if isinstance(results, tuple) else (results,):
        result.zero_()  # remove the results of the last tile

    def run() -> Any:
        return [
            launch.kernel[launch.grid](
                **launch.arguments, **launch.constants, num_warps=launch.warps, num_stages=launch.stages
            )
            for launch in launches
        ]

    try:
        kernel = run()[0]
        off = difference(results, expected)
        if not off < 0.01:
            return about | {"failed": f"results differ by {off:.1e}"}
        replay = captured(run)
        ms = statistics.median(times(replay, count(replay)))
    except Exception as error:  # too much shared memory, mostly
        return about | {"failed": reason(error)}
    return about | {"ms": ms, "registers": kernel.n_regs, "spills": kernel.n_spills, "shared": kernel.metadata.shared}


def tune(calls: list[Sample], arch: int, folder: Path) -> None:
    """Compile all tiles of all calls on all cores, time them one after the other, and print the fastest."""
    jobs = [
        (call.op.name, call.case, call.dtype, arch, place)
        for call in calls
        for place, _ in enumerate(tiles(sample(call.op, call.case, call.dtype, "meta"), arch))
    ]
    start, workers = time.monotonic(), min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        failed = dict(zip(jobs, pool.map(compiled, *zip(*jobs, strict=True)), strict=True))
    print(f"{len(jobs)} tiles, compiled in {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    reports = []
    for call in calls:
        expected = call.op.run(*call.arguments, **call.options)
        timings = []
        for place, tile in enumerate(tiles(call, arch)):
            why = failed[call.op.name, call.case, call.dtype, arch, place]
            timings.append(tile[0] | {"failed": why} if why else timed(tile, expected))
        timings.sort(key=lambda tile: tile.get("ms", float("inf")))
        reports.append({"op": call.op.name, "case": call.case, "type": type_name(call.dtype), "tiles": timings})
        store(folder, "gpu_tiles", reports)
        show(reports[-1])


def show(report: dict[str, Any]) -> None:
    """Print the tile that ships, then the three fastest."""
    ran = [tile for tile in report["tiles"] if "ms" in tile]
    print(f"{report['op']} {report['case']} {report['type']}: {len(ran)} of {len(report['tiles'])} tiles run")
    shipped = [tile for tile in report["tiles"] if "shipped" in tile]
    for tile in shipped + [tile for tile in ran if tile not in shipped][:3]:
        about = tile | {"ms": f"{tile['ms']:.4f}"} if "ms" in tile else tile
        print("   ", ", ".join(f"{key} {value}" for key, value in about.items()))
    sys.stdout.flush()
