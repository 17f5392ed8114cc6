"""The page about calibration: its commands and its Python run one after the other, on two small pictures."""

from pathlib import Path

import pytest
from PIL import Image

from support.pages import OPTION, ROOT, blocks, options_of, page, run_commands

SIDE = 24  # one tile of the demo's bundle


@pytest.mark.slow
def test_the_pages_commands_and_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").symlink_to(ROOT / "demo")
    Path("photos").mkdir()
    for left in (0, 40):
        Image.open("demo/sample.png").crop((left, 8, left + SIDE, 8 + SIDE)).save(f"photos/{left}.png")
    assert run_commands(page("calibration")) == 2
    (code,) = blocks(page("calibration"), "python")
    capsys.readouterr()
    exec(compile(code.text, "calibration.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 60 and all(float(line.split()[-1]) > 0 for line in told[:-1])


def test_the_pages_options_exist() -> None:
    assert set(OPTION.findall(page("calibration"))) <= options_of("calib", "collect") | options_of("export", "build")
