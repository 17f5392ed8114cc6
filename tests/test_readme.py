"""The README's commands run, its snippet runs, its links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.program import Program, Signature, TensorSpec
from tilewright.runtime.bundle.strict import from_json

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


BUILDS = (ROOT / "docs" / "builds.md").read_text()


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def commands(page: str = README) -> list[str]:
    lines = [line for block in blocks("sh", page) for line in block.splitlines()]
    return [line.partition("#")[0].strip() for line in lines if line.strip()]


def test_every_make_target_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = [command.split()[1] for command in commands() if command.startswith("make ")]
    assert named and set(named) <= targets


@pytest.mark.slow
def test_the_commands_and_the_snippet_run_in_an_empty_directory(tmp_path: Path) -> None:
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    (tmp_path / "scores.csv").write_text("image,liqe,musiq\nround1.png,3.1,60\nround2.png,3.3,58\n")
    lines = [command for command in [*commands(), *commands(BUILDS)] if command.startswith("tilewright ")]
    assert len(lines) >= 7 and all(command.startswith(("tilewright ", "make ")) for command in commands())
    for line in lines:
        words = [sys.executable, "-m", "tilewright.cli.main", *line.split()[1:]]
        result = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{line}: {result.stderr}"
    assert (tmp_path / "restored.png").exists()
    for snippet in blocks("python"):
        code = f"{snippet}\nassert image.shape == (256, 320, 3)"
        subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target.partition("#")[0]).exists(), target


def test_the_program_in_the_docs_is_one_that_can_run() -> None:
    text = (ROOT / "docs" / "program.md").read_text()
    program = from_json(Program, re.findall(r"```json\n(.*?)```", text, re.DOTALL)[0], "docs/program.md")
    image, latent = (TensorSpec("float32", ("batch", channels, "h", "w")) for channels in (3, 16))
    number, prompt = TensorSpec("float32", ()), TensorSpec("float32", (1, 512, 4096))
    scalars = dict.fromkeys(("sigma", "sigma_next", "guidance"), number)
    components = {
        "encode": Signature({"image": image}, {"latent": latent}),
        "step": Signature({"z": latent, "y": latent, "prompt": prompt, **scalars}, {"z": latent}),
        "decode": Signature({"latent": latent}, {"image": image}),
    }
    check_program(program, components, {"prompt": prompt})
