"""The memory that the runtime estimates, against the most that a process held, for several sizes. Prints JSON.

Each restoration is a process of its own, so that its peak is its own. `--steps` keeps samplers short: a step holds no
more than the one before it, and the estimate is told.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

THREADS = 2
PROMPT = "a photo"


def measured(bundle: Path, side: int, memory: str, devices: int, steps: int) -> dict[str, object]:
    """One restoration in this process: its estimate, and its peak."""
    import numpy as np

    from tilewright.runtime import load
    from tilewright.runtime.estimate import peak_bytes

    names = [f"cpu:{i}" for i in range(devices)]
    with load(bundle, memory=memory, devices=names, threads=THREADS // devices) as restorer:
        program = restorer.bundle.program
        source = side // program.scale
        pixels = np.random.Generator(np.random.Philox(key=0)).integers(0, 256, (source, source, 3), np.uint8)
        options = {"steps": steps} if any(p.steps for p in program.passes) else {}
        words = {name: PROMPT for name, argument in restorer.arguments.items() if argument.needed}
        needed = restorer.estimate(source, source, **options).needed_bytes
        restoration = restorer.restore(pixels, **options, **words)
        peak = peak_bytes()
        return {
            "system": restorer.bundle.manifest.system,
            "preset": restorer.bundle.manifest.preset,
            "side_px": side,
            "memory": memory,
            "devices": devices,
            "tiles": max(restoration.tiles.values()),
            "needed_bytes": needed,
            "peak_bytes": peak,
            "ratio": round(needed / peak, 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--sides", default="128,256,512", help="of the result, in pixels")
    parser.add_argument("--memory", default="fast")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="measure one bundle at one side, in this process")
    arguments = parser.parse_args()
    if arguments.here:
        side = int(arguments.sides)
        row = measured(arguments.bundles[0], side, arguments.memory, arguments.devices, arguments.steps)
        print(json.dumps(row))
        return
    rows = []
    options = ["--memory", arguments.memory, "--devices", str(arguments.devices), "--steps", str(arguments.steps)]
    for bundle in arguments.bundles:
        for side in arguments.sides.split(","):
            words = [sys.executable, __file__, str(bundle), "--sides", side, *options, "--here"]
            printed = subprocess.run(
                words, check=True, stdout=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"}
            )
            rows.append(json.loads(printed.stdout))
            print("{system} {side_px} px: {needed_bytes} / {peak_bytes} = {ratio}".format(**rows[-1]), file=sys.stderr)
    print(json.dumps({"rows": rows, "command": " ".join(sys.argv[1:]).replace(str(Path.home()), "~")}))


if __name__ == "__main__":
    main()
