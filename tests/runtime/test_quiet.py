"""A program that restores with the runtime finds nothing of it on its own streams, in success and in failure."""

import subprocess
import sys

import pytest
from PIL import Image

PROGRAM = """
import sys
from tilewright.runtime import load, write_image
from tilewright.runtime.errors import TilewrightError

with load(sys.argv[1], threads=1) as restorer:
    write_image("out.png", restorer("in.png"))
    try:
        restorer.engines["sharpen"].run({"image": restorer("in.png")[None]}, ["sharp"])
    except TilewrightError as error:
        print(type(error).__name__)
"""


@pytest.mark.parametrize("mode", ["RGB", "P", "LA", "I;16"])
def test_the_runtime_writes_nothing(bundle, tmp_path, mode) -> None:
    picture = Image.new(mode, (16, 16))
    if mode == "P":
        picture.info["transparency"] = bytes(range(256))  # Pillow warns of it when it converts to RGB
    picture.save(tmp_path / "in.png", **picture.info)
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", PROGRAM, str(bundle)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("BundleError\n", "")
