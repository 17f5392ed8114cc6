"""`optimum-cli export tilewright`: the real command of optimum, and what it loads of ours."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from support.commands import told

try:
    importlib.metadata.version("optimum")
except importlib.metadata.PackageNotFoundError:
    pytest.skip("optimum is not installed: pip install -c constraints.txt optimum", allow_module_level=True)

OPTIMUM = (sys.executable, "-m", "optimum.commands.optimum_cli")
TINY = ("--random-weights", "0", "hitoksr", "--preset", "tiny", "-o")


def run(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, words)], cwd=folder, capture_output=True, text=True, check=False)


def modules(code: str) -> set[str]:
    """The modules that a process has loaded after this code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.slow
def test_a_bundle_that_optimum_builds_has_the_same_bytes(hitoksr_tiny: Path, tmp_path: Path) -> None:
    done = run(*OPTIMUM, "export", "tilewright", *TINY, "bundle", "--target", "ort", "--json", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["built"] is True
    assert (tmp_path / "bundle" / "bundle.json").read_bytes() == (hitoksr_tiny / "bundle.json").read_bytes()


def test_a_dry_run_takes_options_in_any_order(tmp_path: Path) -> None:
    done = run(*OPTIMUM, "export", "tilewright", *TINY, "bundle", "--dry-run", "--json", folder=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["stages"]
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((), 2),
        (("--help",), 0),
        pytest.param(("-h",), 0, marks=pytest.mark.slow),
        pytest.param(("hitoksr", "-o", "b"), 2, marks=pytest.mark.slow),
        (("hitoksr", "--random-weights", "0", "--preset", "tin", "-o", "b"), 2),
        pytest.param(("hitoksr", "--weights", "absent", "-o", "b"), 8, marks=pytest.mark.slow),
        (("hitoksr", "--weights", "absent", "-o", "b", "--json"), 8),
    ],
    ids=str,
)
def test_all_words_go_to_our_command_and_its_answers_and_codes_come_back(
    words: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    ours = told("export", "build", *words, cwd=tmp_path)
    theirs = run(*OPTIMUM, "export", "tilewright", *words, folder=tmp_path)
    assert ours.returncode == theirs.returncode == code, theirs.stderr
    assert (theirs.stdout, theirs.stderr) == (ours.stdout, ours.stderr)
    assert not [*tmp_path.iterdir()]


def test_the_help_of_optimum_names_the_command_and_loads_one_file_of_ours(tmp_path: Path) -> None:
    done = run(*OPTIMUM, "export", "--help", folder=tmp_path)
    assert done.returncode == 0 and "tilewright export build" in " ".join(done.stdout.split())
    code = "import sys\nfrom optimum.commands.optimum_cli import main\nsys.argv = ['optimum-cli', 'export', '--help']"
    before, after = modules(code), modules(f"{code}\ntry: main()\nexcept SystemExit: pass")
    ours = {name for name in after - before if name.startswith(("optimum", "tilewright"))}
    assert ours == {"optimum.commands.register", "optimum.commands.register.tilewright"}
    assert not {"torch", "transformers", "numpy"} & (after - before)
