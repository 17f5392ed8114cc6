"""The page about calibration: its commands and its Python run one after the other, on two small pictures."""

from pathlib import Path

import pytest
from PIL import Image

from support.pages import OPTION, ROOT, blocks, options_of, page, run_commands, verbs_of

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
    Path("judged").mkdir()
    Image.open("demo/sample.png").crop((20, 30, 20 + SIDE, 30 + SIDE)).save("judged/20.png")
    alone = ("--threads", "1")  # threads would mostly wait for each other
    more = {"collect": alone, "sensitivity": (*alone, "--by", "block"), "gate": alone}
    assert run_commands(page("calibration"), more) == 7
    scales, engines = blocks(page("calibration"), "python")
    capsys.readouterr()
    exec(compile(scales.text, "calibration.md", "exec"), {})
    told = capsys.readouterr().out.splitlines()
    assert len(told) > 60 and all(float(line.split()[-1]) > 0 for line in told[:-1])
    exec(compile(engines.text, "calibration.md", "exec"), {})
    share, last = capsys.readouterr().out.splitlines()
    assert int(share.partition("%")[0]) > 80 and float(last.split()[-1]) > 35


def test_the_pages_options_exist() -> None:
    verbs = [("calib", verb) for verb in verbs_of("calib")] + [("export", "build"), ("export", "compile")]
    assert set(OPTION.findall(page("calibration"))) <= set[str]().union(*(options_of(*verb) for verb in verbs))
