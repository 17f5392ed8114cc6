"""The house: what is where, what imports what, and what a lean import loads."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("cli", "export", "kernels", "runtime", "calib")
ELSEWHERE = {  # folder -> its name, where that is not `tilewright` and the folder
    "cli/module": "tilewright",  # what `python -m tilewright` runs
    "cli/optimum": "optimum.commands.register",  # what `optimum-cli` loads
}
MAY_IMPORT = {
    "cli": {"export", "runtime", "kernels", "calib"},
    "runtime": set(),
    "kernels": set(),
    "export": {"runtime", "kernels"},
    "calib": {"export", "runtime"},
}
# lowest first: a file imports its own folder, and what lies lower
EXPORT = (
    {"system.py"},
    {"weights", "tokenizers.py"},
    {"networks", "graph"},
    {"targets", "systems"},
    {"verify", "lint", "plans"},
    {"build"},
    {"new_folder.py"},
    {
        "explain.py",
        "inspect.py",
        "kernels_bench.py",
        "kernels_check.py",
        "onnx_folder.py",
        "space.py",
        "triton_repo.py",
        "unweighted.py",
    },
)
RUNTIME = (
    {"errors.py"},
    {"bundle"},
    {"plan", "engines", "text.py", "images"},
    {"inputs.py", "select.py"},
    {"execute", "memory"},
    {"resume"},
    {"setup.py", "sitting.py"},
    {"cluster"},
    {"native.py", "restore.py", "simulate.py"},
    {"profile.py", "triton_server.py", "folder.py", "atlas.py", "atlas_page.py"},
    {"doctor.py"},
    {"serve"},
)
CALIB = (
    {"scales", "pictures.py", "networks.py"},
    {"observe"},
    {"recipe"},
    {"insertion.py", "inputs.py"},
    {"judge", "unweighted.py"},
    {"engines.py"},
    {"report", "one_step.py"},
)
HEAVY = {"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxruntime", "starlette", "uvicorn"}
LAYERS = {"export": EXPORT, "runtime": RUNTIME, "calib": CALIB}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(file: Path) -> set[str]:
    """Every module a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(("." * node.level) + (node.module or ""))
    return names


def test_the_kernels_folder_is_no_package_that_could_shadow_hugging_face_kernels() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tilewright").exists()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_only_what_it_may(folder: str) -> None:
    allowed = MAY_IMPORT[folder] | {folder}
    for file in sources(folder):
        for name in imported(file):
            assert not name.startswith("."), f"{file}: write the whole name instead of {name}"
            if name.startswith("tilewright"):
                assert name.split(".")[1] in allowed, f"{file} imports {name}"


def imports_inside(folder: str) -> dict[str, set[str]]:
    """Module of a folder -> the modules of the same folder that it imports, also inside functions."""
    files = {f"tilewright.{'.'.join(f.relative_to(ROOT).with_suffix('').parts)}": f for f in sources(folder)}
    files = {name.removesuffix(".__init__"): file for name, file in files.items()}
    graph = {}
    for name, file in files.items():
        froms = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom))
        inner = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        graph[name] = {module for module in imported(file) | inner if module in files} - {name}
    return graph


def layer(module: str) -> int:
    """The place of a module among the layers, by its file or folder."""
    _, folder, part = module.split(".")[:3]
    return next(i for i, parts in enumerate(LAYERS[folder]) if parts & {part, f"{part}.py"})


@pytest.mark.parametrize("folder", LAYERS)
def test_inside_a_folder_nothing_imports_what_lies_higher_or_beside_it(folder: str) -> None:
    graph = {name: modules for name, modules in imports_inside(folder).items() if name.count(".") > 1}
    layers = len(LAYERS[folder])
    assert {layer(name) for name in graph} == set(range(layers))
    for name, modules in graph.items():
        for module in modules - {f"tilewright.{folder}"}:
            beside = name.split(".")[2] != module.split(".")[2] and layer(module) == layer(name) < layers - 1
            assert layer(module) <= layer(name) and not beside, f"{name} imports {module}"


@pytest.mark.parametrize("folder", LAYERS)
def test_inside_a_folder_no_modules_import_each_other_in_a_circle(folder: str) -> None:
    graph = imports_inside(folder)
    while leaves := {name for name, modules in graph.items() if not modules & graph.keys()}:
        graph = {name: modules for name, modules in graph.items() if name not in leaves}
    assert not graph, f"among these is a circle: {', '.join(sorted(graph))}"


def test_the_manifest_reader_needs_only_the_standard_library() -> None:
    for file in [*sources("runtime/bundle"), ROOT / "runtime" / "errors.py"]:
        for module in imported(file):
            top = module.split(".")[0]
            assert top in sys.stdlib_module_names or module.startswith("tilewright.runtime."), (
                f"{file} imports {module}"
            )


def test_every_sub_folder_with_sources_is_packaged() -> None:
    packaged = set(PROJECT["tool"]["setuptools"]["packages"])
    folders = {file.parent.relative_to(ROOT) for folder in FOLDERS for file in sources(folder)}
    names = {ELSEWHERE.get(folder.as_posix(), "tilewright." + ".".join(folder.parts)) for folder in folders}
    assert packaged == names
    mapped = {f"tilewright.{folder}": folder for folder in FOLDERS} | {name: f for f, name in ELSEWHERE.items()}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == mapped


@pytest.mark.parametrize(("folder", "file"), [("cli/module", "__main__.py"), ("cli/optimum", "tilewright.py")])
def test_a_namespace_that_others_share_gets_one_file_and_no_init(folder: str, file: str) -> None:
    assert [path.name for path in sources(folder)] == [file]


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_typed_and_linked_for_checkers(folder: str) -> None:
    assert (ROOT / folder / "py.typed").exists()
    link = ROOT / "typings" / "tilewright" / folder
    assert not link.readlink().is_absolute() and link.resolve() == ROOT / folder


def test_every_source_file_says_what_it_is_and_every_public_function_too() -> None:
    for file in (file for folder in FOLDERS for file in sources(folder)):
        tree = ast.parse(file.read_text())
        assert ast.get_docstring(tree), f"{file} has no docstring"
        exported = next((ast.literal_eval(n.value) for n in tree.body if is_all(n)), [])
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in exported:
                assert ast.get_docstring(node), f"{file}: {node.name} has no docstring"


def is_all(node: ast.stmt) -> bool:
    return isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"


def test_no_file_is_longer_than_600_lines() -> None:
    folders = (*FOLDERS, "bench", "demo", "tests", "tools")
    lengths = {file: len(file.read_text().splitlines()) for folder in folders for file in sources(folder)}
    assert len(lengths) > 200
    assert not {str(file): length for file, length in lengths.items() if length > 600}


def test_versions_are_exact_and_torch_comes_first() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "torch==2.13.0"
    assert all(line.count("==") == 1 for line in lines)


def test_the_runtime_loads_no_heavy_package() -> None:
    loaded = loaded_by("from tilewright.runtime import *")
    assert "tilewright.runtime.restore" in loaded
    assert not HEAVY & loaded


@pytest.mark.parametrize("words", [["export", "list"], ["export", "build", "--help"], ["kernels", "--help"]], ids=str)
def test_a_command_that_computes_nothing_loads_neither_heavy_packages_nor_numpy(words: list[str]) -> None:
    code = f"from tilewright.cli.main import main\ntry: main({words})\nexcept SystemExit: pass"
    loaded = loaded_by(code)
    assert "tilewright.cli.commands" in loaded
    assert not (HEAVY | {"numpy", "PIL"}) & loaded


def loaded_by(code: str) -> set[str]:
    """The modules that a process has loaded after this code."""
    command = [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_the_repository_root_is_not_importable_from_elsewhere(tmp_path: Path) -> None:
    code = "import importlib.util as u; print([n for n in ('export', 'runtime', 'calib', 'tests') if u.find_spec(n)])"
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
