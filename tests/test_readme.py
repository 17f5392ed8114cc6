"""README and pages: commands and snippets run in an empty directory, what cannot run is checked otherwise."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib
from PIL import Image

from support.commands import told
from support.pages import MARKS, OPTION, ROOT, Block, all_options, blocks, commands, options_of, page, verbs_of
from tilewright.export.systems.hitoksr.sizes import PRESETS

HERE = {  # pages whose commands run here, one page after the other in one directory
    "README": ROOT / "README.md",
    "CONTRIBUTING": ROOT / "CONTRIBUTING.md",
    "demo/hitoksr": ROOT / "demo" / "hitoksr" / "README.md",
    "demo/in-token": ROOT / "demo" / "in-token" / "README.md",
    "builds": ROOT / "docs" / "builds.md",
    "targets": ROOT / "docs" / "targets.md",
    "bundle": ROOT / "docs" / "bundle.md",
    "command-line": ROOT / "docs" / "command-line.md",
    "install": ROOT / "docs" / "install.md",
    "kernels": ROOT / "docs" / "kernels.md",
    "large-images": ROOT / "docs" / "large-images.md",
    "profiling": ROOT / "docs" / "profiling.md",
    "python": ROOT / "docs" / "python.md",
    "runtime": ROOT / "docs" / "runtime.md",
}
ELSEWHERE = {  # pages whose commands need files that are not here, and the test that runs them on tiny ones
    "calibration": "calib/test_docs.py",
    "cpp": "runtime/cpp/test_cpp.py",
    "flux": "export/systems/test_docs.py",
    "instantir": "export/systems/test_docs.py",
    "hitoksr": "export/systems/test_hitoksr.py",
    "toksr": "export/systems/test_toksr.py",
    "serving": "runtime/serve/test_docs.py",
}
PAGES = sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("demo/*/README.md")})
MAKEFILE = (ROOT / "Makefile").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
PYTHON = Path(sys.executable)
RUNS = re.compile(r"(tilewright|python -m tilewright|printf|mkdir) ")
REPO = re.compile(r"[\w-]+/[\w.-]+")


def name_of(file: Path) -> str:
    """A page as the test's name shows it."""
    return file.relative_to(ROOT).as_posix()


def make_target(line: str) -> str | None:
    """The target of a `make` command."""
    return line.split()[1] if line.startswith("make ") else None


def typed(line: str) -> None:
    """Run a command as a shell does."""
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    line = f"{PYTHON} {line.removeprefix('python ')}" if line.startswith("python ") else line
    ended = subprocess.run(
        ["bash", "-euc", line], env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, f"{line}: {ended.stderr}"


def run(line: str) -> None:
    """Run a command of ours in this process; what needs a shell has one."""
    if not line.startswith("tilewright ") or re.search(r"[<>|&$]", line):
        typed(line)
        return
    ended = told(*shlex.split(line)[1:])
    assert ended.returncode == 0, f"{line}: {ended.stderr}"


SIDE = 40  # pixels: two tiles by two of HiTokSR


# other pages say what any model does; in bfloat16, random weights miss the gate
REAL = ("README", "CONTRIBUTING", "demo/hitoksr", "demo/in-token", "targets")


@pytest.fixture(scope="module")
def folders(hitoksr_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Directories with the models of demo/ and a corner of its picture, and nothing else; in one, HiTokSR is tiny."""
    folders = {real: tmp_path_factory.mktemp("pages") / "here" for real in (True, False)}
    for real, folder in folders.items():
        (folder / "demo").mkdir(parents=True)
        for models in ("hitoksr", "in-token"):
            if real or models == "in-token":
                (folder / "demo" / models).symlink_to(ROOT / "demo" / models)
        Image.open(ROOT / "demo" / "sample.png").crop((0, 0, SIDE, SIDE)).save(folder / "demo" / "sample.png")
    tiny = shutil.copytree(hitoksr_tiny / "weights" / "hitoksr", folders[False] / "demo" / "hitoksr")
    sizes = {"_class_name": "HiTokSR", **PRESETS["tiny"], "tile_px": 96, "overlap_px": 32}
    (tiny / "config.json").write_text(json.dumps(sizes))
    return folders


@pytest.fixture(scope="module")
def ran() -> set[tuple[bool, str]]:
    """The commands that ran in each directory: the same command on another page does the same."""
    return set()


@pytest.mark.slow
@pytest.mark.parametrize("name", HERE)
def test_commands_and_snippets_run_in_an_empty_directory(
    name: str, folders: dict[bool, Path], ran: set[tuple[bool, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = name in REAL
    monkeypatch.chdir(folders[real])
    for block in blocks(HERE[name].read_text(), "sh", "python"):
        if block.language == "python":
            code = f"{block.text}\nassert image.dtype.name == 'uint8' and image.shape[2] == 3"
            exec(compile(code, name, "exec"), {})
            continue
        for line in [] if block.mark else block.lines:
            if (target := make_target(line)) is not None:
                assert target in TARGETS, line  # what they do runs in other tests, and in CI
            elif (real, line) not in ran:
                assert RUNS.match(line), f"{line}: mark the block with one of {', '.join(MARKS)}"
                (typed if name == "README" else run)(line)  # a new user's commands, each in a process of its own
                for picture in re.findall(r"(\S+\.png)", line if " restore " in line else ""):
                    assert Path(picture).stat().st_size, line
                ran.add((real, line))


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_each_page_with_commands_is_run_by_a_test(file: Path) -> None:
    if blocks(file.read_text(), "sh", "python") and file not in HERE.values():
        assert file.parent == ROOT / "docs" and file.stem in ELSEWHERE, f"{name_of(file)}: no test runs its commands"
        assert f'page("{file.stem}")' in (ROOT / "tests" / ELSEWHERE[file.stem]).read_text()


MARKED = [(name_of(file), block) for file in PAGES for block in blocks(file.read_text(), "sh") if block.mark]


@pytest.mark.parametrize(("name", "block"), MARKED, ids=[f"{name} {block.mark}" for name, block in MARKED])
def test_a_command_that_cannot_run_here_is_checked_otherwise(name: str, block: Block) -> None:
    assert block.mark in MARKS, f"{name}: {block.mark!r} is not one of {', '.join(MARKS)}"
    for line in block.lines:
        words = line.split()
        if (target := make_target(line)) is not None:
            assert target in TARGETS, line
        elif words[0] == "tilewright":
            assert words[2] in verbs_of(words[1]) and set(OPTION.findall(line)) <= options_of(*words[1:3]), line
        elif words[0] == "pip":
            assert_installable(line)
        elif words[:2] == ["hf", "download"]:
            assert REPO.fullmatch(words[2]), line
            options = words[3:]  # each with one value, as the command takes them
            assert set(options[::2]) <= {"--include", "--exclude", "--local-dir"} and len(options) % 2 == 0, line
            folder = words[words.index("--local-dir") + 1]
            assert any(folder.split("/")[0] in command for command in commands((ROOT / name).read_text())), line
        else:
            assert words[0] in ("python3", ".", "hf", "git", "cd", "docker", "curl", "head", "chmod", "ray"), (
                f"{line}: nothing checks this"
            )


def assert_installable(line: str) -> None:
    """Extras are ours, versions the tested ones, and files there."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for listed in re.findall(r"\[([\w,]+)\]", line):
        assert set(listed.split(",")) <= extras.keys(), line
    for package in re.findall(r"[\w-]+==[\w.]+", line):
        assert package in (ROOT / "constraints.txt").read_text().splitlines(), line
    for file in re.findall(r"-[cr] (\S+)", line):
        assert (ROOT / file).is_file(), line


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_commands_in_running_text_exist(file: Path) -> None:
    for line in re.findall(r"`((?:tilewright|make) [^`]+)`", file.read_text()):
        words = line.split()
        if (target := make_target(line)) is not None:
            assert target in TARGETS, line
        elif words[1] in ("export", "runtime", "calib", "kernels") and len(words) > 2:
            assert words[2] in verbs_of(words[1]), line
            assert set(OPTION.findall(line)) <= options_of(*words[1:3]), line


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower().replace("`", "")).strip().replace(" ", "-")


@pytest.mark.parametrize("file", PAGES, ids=name_of)
def test_every_link_leads_somewhere(file: Path) -> None:
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        other = file.parent / path if path else file
        assert other.exists(), target
        if anchor:
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)), target


def test_the_readme_is_short_and_names_the_command_that_ci_runs() -> None:
    text = HERE["README"].read_text()
    assert len(text.splitlines()) <= 120
    named, run_by_ci = (
        {*map(make_target, lines)} for lines in (commands(text), (ROOT / ".ci" / "run").read_text().splitlines())
    )
    assert (named & run_by_ci) - {None}


def test_options_of_the_command_line_page_exist() -> None:
    assert set(OPTION.findall(page("command-line"))) <= all_options()
