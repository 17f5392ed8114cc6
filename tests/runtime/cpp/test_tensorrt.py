"""The C++ library with TensorRT, over imitations of TensorRT and of NVIDIA's driver: Python's pixels, and its refusals.

Nothing here says whether TensorRT runs a plan, how exact it is, or how fast.
"""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.scenes import scene
from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.restore import load

pytestmark = pytest.mark.slow  # the compiler takes a while
Restored = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def restored(run: Restored, build: Callable[[], Path], imitated_gpu: None, tmp_path: Path) -> Restored:
    """Restore in.png with a plan of these words, on the GPU."""
    bundle = build()
    Image.fromarray(scene(70, 53)).save(tmp_path / "in.png")

    def restored(*words: object, plan: str = "imitation") -> subprocess.CompletedProcess[str]:
        (bundle / "engines").mkdir(exist_ok=True)
        (bundle / "engines" / "sharpen.plan").write_text(plan)
        path = bundle / "bundle.json"
        manifest = json.loads(path.read_text())
        manifest["files"]["engines/sharpen.plan"] = {"size": len(plan), "sha256": sha256_of_bytes(plan.encode())}
        engines = manifest["components"]["sharpen"]["engines"]
        names = {"name": "tensorrt-float32", "backend": "tensorrt", "device": "cuda"}
        needs = {"compute_capability": [9, 0], "packages": {"tensorrt": "10.16.1.11"}, "exactly": True}
        engines[1:] = [engines[0] | names | {"files": ["engines/sharpen.plan"], "needs": needs}]
        path.write_text(json.dumps(manifest))
        files = ["--bundle", bundle, tmp_path / "in.png", tmp_path / "out.png", "--devices", "cuda:0"]
        return run("tilewright-restore", *files, *words)

    return restored


@pytest.mark.parametrize(
    "words", [[], ["--batch", 4], ["--tile", 32, "--memory", "low"], ["--tile", 96, "--overlap", 8]], ids=str
)
def test_it_has_pythons_pixels(restored: Restored, tmp_path: Path, words: list[object]) -> None:
    done = restored(*words)
    assert done.returncode == 0, done.stderr
    options = dict(zip((str(word)[2:] for word in words[::2]), words[1::2], strict=True))
    opened = {name: options.pop(name) for name in ("batch", "memory") if name in options}
    with load(tmp_path / "sharpen.bundle", engine="ort", **opened) as restorer:
        right = restorer(tmp_path / "in.png", **options)
    difference = np.abs(np.asarray(Image.open(tmp_path / "out.png")).astype(int) - right)
    assert right.std() > 20 and difference.max() <= 1 and (difference == 0).mean() >= 0.999


@pytest.mark.parametrize(
    ("plan", "code", "said"),
    [
        ("no plan", 3, "refuses the plan (IRuntime::deserializeCudaEngine: magicTag: the serialization is corrupt)"),
        ("imitation memory", 5, "out of memory"),
        ("imitation unknown", 3, "reads a weight 'other' that weights.json does not list"),
        ("imitation more", 3, "'weight' is float32 [3, 1, 3, 3], and not 54 numbers of float32"),
        ("imitation missing", 3, "1 weights got no values, the first is 'bias'"),
        ("imitation half", 3, "input 'image' is float32, not float16"),
    ],
)
def test_a_plan_that_does_not_work_is_refused_in_one_line(restored: Restored, plan: str, code: int, said: str) -> None:
    done = restored(plan=plan)
    *notes, line = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (code, "") and said in line, done.stderr
    assert [note for note in notes if "the image began anew with" not in note] == []


def test_a_tile_that_no_profile_takes_is_refused(restored: Restored) -> None:
    done = restored("--tile", 104)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert (
        "image of shape [1, 3, 104, 104] is in no profile of the plan, which takes image of [1, 3, 8, 8] to"
        in done.stderr
    )
