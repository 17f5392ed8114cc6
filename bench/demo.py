"""The quality of the shipped models on images without training, beside bicubic, through bundles and the runtime.

Prints JSON; `bench/run.py` stores it. The degradation of each image is fixed (tools/train/data.py).
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.export.system import Settings
from tilewright.export.verify.seams import seam_excess
from tilewright.runtime import load
from tilewright.runtime.plan.passes import plan_of
from tilewright.runtime.restore import Restorer

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
from train import data
from train.metrics import measures

FLOW = {"steps": 8, "seed": 0}
SQUARE = "camera"  # 512 px
TILE = 96


def quality(restorers: dict[str, tuple[Restorer, dict[str, Any]]]) -> dict[str, Any]:
    """All measures of every image, and their averages over photographs and over all images."""
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for name, sharp, small in data.kept_back("held-out"):
        pictures = {"bicubic": data.enlarged(small)}
        pictures |= {system: restorer(small, **options) for system, (restorer, options) in restorers.items()}
        rows[name] = {system: measures(image, sharp) for system, image in pictures.items()}
    groups = {"all": list(rows), "photographs": [name for name in rows if "-" not in name]}
    averages = {
        group: {system: mean([rows[name][system] for name in names]) for system in rows[names[0]]}
        for group, names in groups.items()
    }
    return {"averages": averages, "images": rows}


def mean(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def codebooks(restorer: Restorer) -> list[dict[str, float]]:
    """For every group, the share of codewords that held-out images use, and the perplexity of their use."""
    chosen = []
    for _, _, small in data.kept_back("held-out"):
        for tile in data.squares(data.enlarged(small), TILE):
            planes = np.ascontiguousarray(tile.transpose(2, 0, 1)[None], np.float32) / 255
            indices = restorer.engines["generate"].run({"image": planes}, ["indices"])["indices"]
            chosen.append(np.asarray(indices)[0].reshape(indices.shape[1], -1))
    sizes = Settings.from_json(restorer.bundle.manifest.options["settings"]).sizes
    usage = []
    for group in np.concatenate(chosen, 1):
        counts = np.bincount(group, minlength=sizes["codes"])
        shares = counts[counts > 0] / counts.sum()
        usage.append(
            {"used": float((counts > 0).mean()), "perplexity": float(np.exp(-(shares * np.log(shares)).sum()))}
        )
    return usage


def seams(restorer: Restorer, options: dict[str, Any]) -> dict[str, Any]:
    """A square of 512 px restored in tiles and as one tile: seams at the same borders, and all measures."""
    sharp, small = next((s, d) for name, s, d in data.kept_back("held-out") if name == SQUARE)
    program = restorer.bundle.program
    last = [p for p in program.passes if "result" in p.writes()][-1]
    plan = plan_of(program, last, *sharp.shape[:2], None, None)
    pictures = {"tiled": restorer(small, **options), "direct": restorer(small, tile=max(sharp.shape), **options)}
    return {
        name: {
            "seam_excess": seam_excess(image.transpose(2, 0, 1).astype(np.float32) / 255, plan, program.multiple_px),
            **measures(image, sharp),
        }
        for name, image in pictures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--hitoksr", type=Path, metavar="BUNDLE")
    parser.add_argument("--in-token", type=Path, metavar="BUNDLE")
    arguments = parser.parse_args()
    restorers, results = {}, {}
    if arguments.hitoksr:
        restorers["hitoksr"] = load(arguments.hitoksr), {}
        results["codebooks"] = codebooks(restorers["hitoksr"][0])
    if arguments.in_token:
        restorers["in-token"] = load(arguments.in_token), FLOW
        restorers["in-token, 28 steps"] = restorers["in-token"][0], FLOW | {"steps": 28}
        results["seams of in-token"] = seams(*restorers["in-token"])
    print(json.dumps(quality(restorers) | results, indent=1))


if __name__ == "__main__":
    main()
