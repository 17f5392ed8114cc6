"""What the keys of stages follow: options, weights, versions, and all code that a stage is made of."""

import ast
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from support.systems import settings_of
from tilewright.export.build import code as code_module
from tilewright.export.build.code import HOUSE, code, imports
from tilewright.export.build.request import Request
from tilewright.export.build.stage_list import list_stages
from tilewright.export.system import Settings
from tilewright.export.systems import SYSTEMS


def keys(tmp_path: Path, **changes: object) -> dict[str, str]:
    """The key of every stage of a tiny build."""
    asked = {"name": "hitoksr", "preset": "tiny", "out": tmp_path / "b", "seed": 0} | changes
    return {stage.name: stage.key for stage in list_stages(Request(**asked))}  # type: ignore[arg-type]


def test_a_stage_key_follows_what_it_depends_on(tmp_path: Path) -> None:
    plan = keys(tmp_path)
    seed = keys(tmp_path, seed=1)
    assert seed["trace"] == plan["trace"]
    assert all(seed[name] != plan[name] for name in ("attach", "optimise", "verify", "seal"))
    packed = keys(tmp_path, pack=True)
    assert packed["attach"] != plan["attach"] and packed["seal"] != plan["seal"]
    ops = keys(tmp_path, ops="standard")
    assert {name for name in plan if ops[name] != plan[name]} == {"optimise", "verify", "seal"}
    for tiles in ({"tiles": (64,)}, {"batches": (1, 4)}):
        other = keys(tmp_path, **tiles)
        assert {name for name in plan if other[name] != plan[name]} == {"verify", "seal"}


def test_another_precision_only_verifies_and_seals_again(tmp_path: Path) -> None:
    engines = {"targets": ("ort", "openvino")}
    plan, other = keys(tmp_path, **engines), keys(tmp_path, **engines, precisions=("float32", "bfloat16"))
    assert {name for name in plan if other[name] != plan[name]} == {"verify", "seal"}
    fewer = keys(tmp_path)
    assert {name for name in plan if fewer[name] != plan[name]} == {"optimise", "verify", "seal"}


def test_another_lora_traces_nothing_and_embeds_nothing_again(tmp_path: Path) -> None:
    shapes = {"lora_A": (2, 32), "lora_B": (32, 2)}
    for seed in (0, 1):
        values = np.random.default_rng(seed)
        pairs = {
            f"transformer.transformer_blocks.0.attn.to_q.{part}.weight": values.normal(size=shape).astype(np.float32)
            for part, shape in shapes.items()
        }
        save_file(pairs, tmp_path / f"{seed}.safetensors")
    one, other = (
        keys(tmp_path, name="in-token", system_options={"lora": str(tmp_path / f"{seed}.safetensors")})
        for seed in (0, 1)
    )
    assert {name for name in one if other[name] != one[name]} == {"attach", "optimise", "verify", "seal"}


def test_every_stage_follows_the_versions_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = keys(tmp_path)
    monkeypatch.setattr("tilewright.export.build.versions.version", lambda package: "another")
    other = keys(tmp_path)
    assert {name for name in plan if other[name] != plan[name]} >= {"trace", "constants", "optimise", "verify", "seal"}


def test_the_tokenizers_files_are_in_the_key_of_constants(hitoksr_tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(hitoksr_tiny / "weights" / "hitoksr", tmp_path / "mine")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    before = keys(tmp_path, seed=None, weights=folder)
    (folder / "tokenizer" / "vocab.json").write_text("{ }")
    after = keys(tmp_path, seed=None, weights=folder)
    assert {name for name in before if after[name] != before[name]} == {"constants", "verify", "seal"}


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code."""
    house = tmp_path_factory.mktemp("house")
    for folder in ("export", "kernels", "runtime"):
        shutil.copytree(HOUSE / folder, house / folder, ignore=shutil.ignore_patterns("__pycache__", "native"))
    return house


@pytest.fixture(scope="module")
def unedited(house: Path) -> dict[str, str]:
    """The keys of a build by the copied code."""
    return keys_of_edited(house)


def keys_of_edited(house: Path, *files: str) -> dict[str, str]:
    """The keys of a build by the copied code, with other text in these files."""
    texts = {house / file: (house / file).read_text() for file in files}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_module, "HOUSE", house)
        code_module._file_of.cache_clear()
        try:
            for path, text in texts.items():
                path.write_text(text + "\n# edited\n")
            return keys(house)
        finally:
            for path, text in texts.items():
                path.write_text(text)
            code_module._file_of.cache_clear()


@pytest.mark.parametrize(
    ("file", "stage"),
    [
        ("export/system.py", "trace"),
        ("export/networks/hitoksr.py", "trace"),
        ("export/graph/trace.py", "trace"),
        ("kernels/jit.py", "trace"),
        ("kernels/table.py", "trace"),
        ("export/build/stages/trace.py", "trace"),
        ("export/systems/hitoksr/system.py", "attach"),
        ("export/weights/files.py", "attach"),
        ("export/build/attachment.py", "attach"),
        ("export/build/stages/attach.py", "attach"),
        ("export/build/streamed.py", "constants"),
        ("export/build/stages/constants.py", "constants"),
        ("export/graph/rewrites/fold.py", "optimise"),
        ("export/graph/footprint.py", "optimise"),
        ("export/targets/ort.py", "optimise"),
        ("export/build/stages/optimise.py", "optimise"),
        ("export/verify/seams.py", "verify"),
        ("runtime/execute/executor.py", "verify"),
        ("runtime/engines/ort.py", "verify"),
        ("runtime/text.py", "verify"),
        ("runtime/inputs.py", "verify"),
        ("export/build/assembly.py", "verify"),
        ("export/build/stages/verify.py", "verify"),
        ("runtime/bundle/write.py", "seal"),
        ("export/build/stages/seal.py", "seal"),
    ],
)
def test_editing_a_file_that_matters_changes_its_stage(
    house: Path, unedited: dict[str, str], file: str, stage: str
) -> None:
    assert keys_of_edited(house, file)[stage] != unedited[stage]


def test_editing_a_file_that_does_not_matter_keeps_the_graphs(house: Path, unedited: dict[str, str]) -> None:
    edited = keys_of_edited(
        house,
        "export/verify/seams.py",
        "runtime/execute/executor.py",
        "export/systems/toksr/system.py",
        "export/inspect.py",
    )
    assert edited["trace"] == unedited["trace"]
    assert keys_of_edited(house) == unedited


def statements(block: ast.AST) -> Iterator[ast.AST]:
    """Every statement in a block, at any depth; to look also into expressions takes ten times as long."""
    for field in ("body", "orelse", "finalbody", "handlers", "cases"):
        for part in getattr(block, field, ()):
            yield part
            yield from statements(part)


@pytest.mark.slow
def test_imports_are_found_as_python_finds_them() -> None:
    for file in (file for folder in ("export", "kernels", "runtime") for file in (HOUSE / folder).rglob("*.py")):
        text = file.read_text()
        expected = set()
        for node in statements(ast.parse(text)):
            if isinstance(node, ast.Import):
                expected |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                expected |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
        assert expected <= set(imports(text)), file


def test_a_module_that_is_not_there_is_no_silent_nothing() -> None:
    with pytest.raises(LookupError, match=r"tilewright\.export\.nowhere"):
        code("tilewright.export.nowhere")


@pytest.mark.parametrize("name", SYSTEMS)
def test_settings_come_back_from_a_manifest_as_they_were(name: str) -> None:
    settings = settings_of(name)
    assert Settings.from_json(settings.to_json()) == settings
    assert Settings.from_json(json.dumps(json.loads(settings.to_json()))) == settings
