"""The Dockerfile: hadolint finds nothing in it, and what its commands name exists. No Docker runs here."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

from support.pages import ROOT, options_of

FILE = (ROOT / "Dockerfile").read_text()
STAGES = dict(re.findall(r"^FROM \S+ AS (\w+)\n(.*?)(?=^FROM|\Z)", FILE, re.DOTALL | re.MULTILINE))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def extras(stage: str) -> set[str]:
    return {name for group in re.findall(r"whl\)\[([\w,]+)\]", STAGES[stage]) for name in group.split(",")}


def test_hadolint_finds_nothing() -> None:
    hadolint = shutil.which("hadolint", path=Path(sys.executable).parent) or shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed")
    ended = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout


def test_the_image_that_serves_has_no_pytorch_and_no_root() -> None:
    assert [*STAGES] == ["wheel", "export", "runtime"]
    assert extras("runtime") == {"cpu", "openvino", "text", "serve"} and "export" in extras("export")
    needed = [package for name in extras("runtime") for package in EXTRAS[name]]
    assert needed and not [package for package in needed if package.startswith(("torch", "tilewright", "diffusers"))]
    for stage in ("export", "runtime"):
        assert re.search(r"^USER 10001$", STAGES[stage], re.MULTILINE)
    assert "HEALTHCHECK" in STAGES["runtime"] and "/v2/health/live" in STAGES["runtime"]


def test_the_command_of_the_image_is_one_of_ours() -> None:
    command = json.loads(re.findall(r"^CMD (.*)$", STAGES["runtime"], re.MULTILINE)[-1])
    assert command[:2] == ["runtime", "serve"]
    assert {word for word in command if word.startswith("--")} <= options_of("runtime", "serve")


def test_what_the_stages_copy_is_there() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", FILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert ".git" in ignored and not {"constraints.txt", "kernels", "setup.py"} & set(ignored)
