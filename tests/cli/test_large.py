"""`restore` of pictures whose pixels lie on the disk, and of their colours."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from support.scenes import noise
from tilewright.cli.main import main

pyvips = pytest.importorskip("pyvips", reason="images larger than memory need pyvips")


def restore(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = main(["runtime", "restore", *words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_sixteen_bits_go_in_and_out(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(60, 80, 3)).save("in.png")
    words = ("in.png", "out.tif", "--bundle", str(bundle), "--tile", "32", "--bits", "16", "--color", "adain", "--json")
    code, out, err = restore(capsys, *words)
    answer = json.loads(out)
    assert code == 0 and answer["bits"] == 16 and answer["on_disk"] and isinstance(answer["seam_excess"], float)
    assert "the pixels of the picture lie on the disk" in err
    result = pyvips.Image.new_from_file("out.tif").numpy()
    assert result.dtype == np.uint16 and result.shape == (120, 160, 3)
    assert not list(Path().glob("out.tif.*"))
    assert restore(capsys, *words[:1], "off.tif", *words[2:-2], "off", "-q")[0] == 0
    assert (pyvips.Image.new_from_file("off.tif").numpy() != result).mean() > 0.9


def test_what_does_not_work_is_refused_in_one_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(noise(8, 8, 3)).save("in.png")
    Path("folder.tif").mkdir()
    for words, said in (
        (("in.png", "out.jpg", "--bits", "16"), "--bits 16: .jpg holds 8 bits a channel; use .png or .tif"),
        (("in.png", "-", "--bits", "16"), "--bits 16 works from a file to a file only; name both"),
        (("in.png", "out.png", "--jitter"), "has no pass that joins its tiles after every step; leave it out"),
        (("in.png", "folder.tif"), "folder.tif is a directory: name a file"),
        (("in.png", "."), ". is a directory: name a file"),
    ):
        code, _, err = restore(capsys, *words, "--bundle", str(bundle), "-q")
        assert code == 2 and said in err and err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir() if path.suffix != ".bundle" and path.name != "models") == [
        "folder.tif",
        "in.png",
    ]
