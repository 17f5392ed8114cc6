"""The memory that the runtime estimates, against the most that a process held, for several sizes. Prints JSON.

Each restoration is a process of its own, so that its peak is its own. `--steps` keeps samplers short: a step holds no
more than the one before it, and the estimate is told. The peak counts weights that are mapped from files, because the
system keeps them while memory is free. So the ratio counts them too.
"""

import argparse
import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

THREADS = 2
PROMPT = "a photo"
WAYS = ("fast", "low", "low,devices=2,batch=4")


def measured(bundle: Path, side: int, way: str, steps: int) -> dict[str, object]:
    """One restoration in this process: its estimate, and its peak."""
    import numpy as np

    from tilewright.runtime import load
    from tilewright.runtime.memory.machine import peak_bytes

    memory, *options = way.split(",")
    numbers = {name: int(value) for name, value in (option.split("=") for option in options)}
    devices, batch = numbers.get("devices", 1), numbers.get("batch")
    names = [f"cpu:{i}" for i in range(devices)]
    with load(bundle, memory=memory, devices=names, threads=THREADS // devices, batch=batch) as restorer:
        program = restorer.bundle.program
        source = side // program.scale
        pixels = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (source, source, 3), np.uint8)
        stepped = {"steps": steps} if any(p.steps for p in program.passes) else {}
        words = {name: PROMPT for name, argument in restorer.arguments.items() if argument.needed}
        needs = restorer.estimate(source, source, **stepped)
        restoration = restorer.restore(pixels, **stepped, **words)
        peak = peak_bytes()
        return {
            "system": restorer.bundle.manifest.system,
            "preset": restorer.bundle.manifest.preset,
            "side_px": side,
            "way": way,
            "tiles": max(restoration.tiles.values()),
            "needed_bytes": needs.needed_bytes,
            "mapped_bytes": needs.mapped_bytes,
            "peak_bytes": peak,
            "ratio": round((needs.needed_bytes + needs.mapped_bytes) / peak, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--sides", default="128,256,512", help="of the result, in pixels")
    parser.add_argument(
        "--ways", default=";".join(WAYS), help="memory, devices and batch, as fast,devices=2,batch=4;low"
    )
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--here", action="store_true", help="measure one bundle at one side, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        row = measured(arguments.bundles[0], int(arguments.sides), arguments.ways, arguments.steps)
        print(json.dumps(row))
        return
    rows = []
    for bundle, way, side in product(arguments.bundles, arguments.ways.split(";"), arguments.sides.split(",")):
        words = [sys.executable, __file__, str(bundle), "--sides", side, "--ways", way, "--steps", str(arguments.steps)]
        printed = subprocess.run(
            [*words, "--here"], check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        rows.append(json.loads(printed.stdout))
        text = "{system} {preset} {side_px} px, {way}: ({needed_bytes} + {mapped_bytes}) / {peak_bytes} = {ratio}"
        print(text.format(**rows[-1]), file=sys.stderr)
    print(json.dumps({"rows": rows, "threads": THREADS, "steps": arguments.steps}))


if __name__ == "__main__":
    main()
