"""`export triton-repo`: its files, its model on a stand-in of the server's module, and in the server itself."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image
from safetensors.numpy import save_file

from support.modules import module_at
from support.scenes import noise
from support.triton_server import NO_MESSAGES, ask, model_config, served, server
from tilewright.cli.main import main
from tilewright.export.triton_repo import triton_repo
from tilewright.runtime.errors import BundleError, UsageError

__all__ = ["server"]
pytest_plugins = ("support.bundles",)
INPUTS = {
    "image": ("TYPE_STRING", False),
    "seed": ("TYPE_INT64", True),
    "tile": ("TYPE_INT64", True),
    "overlap": ("TYPE_INT64", True),
    "scale": ("TYPE_INT64", True),
    "prompt": ("TYPE_STRING", True),
    "look": ("TYPE_STRING", True),
    "gain": ("TYPE_FP64", True),
}


@dataclass
class Tensor:
    """As in `triton_python_backend_utils`: a name and an array."""

    tensor_name: str
    array: Any

    def name(self) -> str:
        return self.tensor_name

    def as_numpy(self) -> Any:
        return self.array


@dataclass
class Response:
    """Outputs, or an error."""

    output_tensors: list[Tensor] = field(default_factory=list)
    error: str | None = None

    def outputs(self) -> dict[str, bytes]:
        assert self.error is None
        assert all(tensor.array.shape == (1,) for tensor in self.output_tensors)
        return {tensor.name(): tensor.array[0] for tensor in self.output_tensors}


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a module in the place of the server's, with what our model uses of it."""
    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, Response, str
    module.get_input_tensor_by_name = lambda request, name: request.get(name)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)


def opened(repository: Path) -> Any:
    """The model of a repository, initialised as the server does it."""
    text = (repository / "tilewright" / "config.pbtxt").read_text()
    said = re.findall(r'key: "(\w+)" value \{ string_value: (".*") \}', text)
    config = {"parameters": {key: {"string_value": json.loads(value)} for key, value in said}}
    model = module_at(repository / "tilewright" / "1" / "model.py").TritonPythonModel()
    folder = {"model_repository": str(repository / "tilewright"), "model_version": "1"}
    model.initialize({"model_config": json.dumps(config), **folder})
    return model


def message(repository: Path) -> Any:
    kind = model_config()
    if kind is None:
        pytest.skip(NO_MESSAGES)
    return text_format.Parse((repository / "tilewright" / "config.pbtxt").read_text(), kind())


def request(**values: Any) -> dict[str, Tensor]:
    """The tensors of a request, as clients send them."""
    kinds = {bytes: np.object_, int: np.int64, float: np.float64}
    return {name: Tensor(name, np.array([value], kinds[type(value)])) for name, value in values.items()}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(noise(70, 90, 3)).save(path)
    return path


@pytest.fixture
def look(tmp_path: Path) -> Path:
    save_file({"look.tint": np.float32([[0.5, 0.25, 1]])}, tmp_path / "look.safetensors")
    return tmp_path / "look.safetensors"


def restored(photo: Path, bundle: Path, *words: str) -> bytes:
    """The bytes that `runtime restore` writes."""
    out = photo.with_name("restored.png")
    command = ["runtime", "restore", str(photo), str(out), "--bundle", str(bundle), "--quiet", *words]
    assert main(command) == 0
    return out.read_bytes()


def cases(photo: Path, look: Path) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
    """Words of the command line, and the inputs that mean the same."""
    image = photo.read_bytes()
    return [
        ((), {"image": image}),
        (("--tile", "48", "--overlap", "8", "--seed", "3"), {"image": image, "tile": 48, "overlap": 8, "seed": 3}),
        (("--prompt", "dim red", "--gain", "2.5"), {"image": image, "prompt": b"dim red", "gain": 2.5}),
        (("--look", str(look)), {"image": image, "look": look.read_bytes()}),
    ]


BAD = [
    ({"gain": 9.0}, "gain=9.0 is not a number from -8 to 8"),
    ({"prompt": b"\xff"}, "prompt is not UTF-8; give text"),
    ({"image": b"no image"}, "the image"),
    ({"look": b"no tensors"}, "give a safetensors file with look.tint"),
    ({"tile": -1}, "tile=-1"),
]


@pytest.mark.slow
def test_the_model_gives_the_bytes_that_restore_writes(tinted, photo, look, tmp_path, stand_in, capsys) -> None:
    triton_repo(tinted, tmp_path / "repository")
    model = opened(tmp_path / "repository")
    asked = cases(photo, look)
    answers = model.execute([request(**inputs) for _, inputs in asked])
    model.finalize()
    pictures = [restored(photo, tinted, *words) for words, _ in asked]
    assert [answer.outputs() for answer in answers] == [{"restored": p, "notes": b""} for p in pictures]
    assert len(set(pictures)) > 2


@pytest.mark.parametrize(("values", "complaint"), BAD, ids=lambda value: str(value)[:20])
def test_a_bad_request_is_answered_by_one_line_and_the_others_go_on(
    tinted, photo, tmp_path, stand_in, values, complaint
) -> None:
    triton_repo(tinted, tmp_path / "repository")
    model = opened(tmp_path / "repository")
    good = request(image=photo.read_bytes())
    bad, after = model.execute([good | request(**values), good])
    model.finalize()
    assert complaint in bad.error and "\n" not in bad.error
    assert after.outputs()["restored"].startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_config_is_a_message_of_the_server(tinted, tmp_path) -> None:
    triton_repo(tinted, tmp_path / "repository", devices=("cpu:0",))
    config = message(tmp_path / "repository")
    assert (config.name, config.backend, config.max_batch_size) == ("tilewright", "python", 0)
    kinds = type(config).DESCRIPTOR.file.enum_types_by_name["DataType"].values_by_number
    assert {i.name: (kinds[i.data_type].name, i.optional) for i in config.input} == INPUTS
    assert {o.name: kinds[o.data_type].name for o in config.output} == dict.fromkeys(
        ("restored", "notes"), "TYPE_STRING"
    )
    assert all([*tensor.dims] == [1] for tensor in (*config.input, *config.output))
    assert not config.model_transaction_policy.decoupled and not config.HasField("dynamic_batching")
    (group,) = config.instance_group
    assert (group.count, group.kind) == (1, type(group).KIND_CPU)
    parameters = {name: value.string_value for name, value in config.parameters.items()}
    digest = json.loads(subprocess.check_output([*INSPECT, str(tinted), "--json"]))["digest"]
    assert parameters == {
        "bundle": str(tinted),
        "digest": digest,
        "devices": "cpu:0",
        "threads": "0",
        "memory": "fast",
    }


INSPECT = (sys.executable, "-m", "tilewright.cli.main", "export", "inspect")


def test_a_packed_repository_needs_neither_the_bundle_nor_its_weights(
    two_folder_bundle, photo, tmp_path, stand_in
) -> None:
    root = two_folder_bundle()
    picture = restored(photo, root)
    written = triton_repo(root, tmp_path / "repository", pack=True)
    copied = [f for f in (tmp_path / "repository" / "tilewright" / "1" / "bundle").rglob("*") if f.is_file()]
    assert written["copied_bytes"] == sum(f.stat().st_size for f in copied)
    for gone in (root, tmp_path / "models", tmp_path / "other"):
        shutil.rmtree(gone)
    moved = (tmp_path / "repository").rename(tmp_path / "elsewhere")
    model = opened(moved)
    (answer,) = model.execute([request(image=photo.read_bytes())])
    model.finalize()
    assert answer.outputs()["restored"] == picture


def test_weights_that_moved_are_named_in_the_config(bundle, weights_dir, photo, tmp_path, stand_in) -> None:
    picture = restored(photo, bundle)
    moved = weights_dir.rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="are in none of"):
        triton_repo(bundle, tmp_path / "repository")
    assert not (tmp_path / "repository").exists()
    triton_repo(bundle, tmp_path / "repository", weights_dir=moved)
    model = opened(tmp_path / "repository")
    (answer,) = model.execute([request(image=photo.read_bytes())])
    model.finalize()
    assert answer.outputs()["restored"] == picture


def test_another_bundle_in_the_place_of_the_one_that_was_meant_is_refused(bundle, tint, tmp_path, stand_in) -> None:
    triton_repo(bundle, tmp_path / "repository")
    shutil.rmtree(bundle)
    tint(bundle.name)
    with pytest.raises(BundleError, match="is not the expected"):
        opened(tmp_path / "repository")


def test_a_place_that_is_taken_and_a_device_that_is_none_are_refused(bundle, tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=r"is not an empty folder; choose another$"):
        triton_repo(bundle, tmp_path / "file")
    with pytest.raises(UsageError, match="device 'gpu' is unknown"):
        triton_repo(bundle, tmp_path / "repository", devices=("gpu",))
    assert main(["export", "triton-repo", str(tmp_path), "-o", str(tmp_path / "repository")]) == 3
    assert not (tmp_path / "repository").exists() and (tmp_path / "file").read_text() == "mine"


def test_the_command_answers_in_json_and_as_a_line(tinted, tmp_path, capsys) -> None:
    assert main(["export", "triton-repo", str(tinted), "-o", str(tmp_path / "a"), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer == triton_repo(tinted, tmp_path / "b") | {"folder": str(tmp_path / "a")}
    assert answer["inputs"] == list(INPUTS)
    assert main(["export", "triton-repo", str(tinted), "-o", str(tmp_path / "c"), "--pack", "-q"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'c'}: model tilewright; inputs image, seed,")


@pytest.mark.slow
@pytest.mark.parametrize("pack", [False, True], ids=["referred to", "packed"])
def test_the_server_itself_gives_the_bytes_that_restore_writes(server, tinted, photo, look, tmp_path, pack) -> None:
    triton_repo(tinted, tmp_path / "repository", pack=pack)
    asked = cases(photo, look)
    with served(server, tmp_path / "repository") as url:
        answers = [ask(url, inputs) for _, inputs in asked]
        refusals = [ask(url, {"image": photo.read_bytes(), **values}) for values, _ in BAD]
        unknown = ask(url, {"image": photo.read_bytes(), "promt": b"dim"})
    assert answers == [{"restored": restored(photo, tinted, *words), "notes": b""} for words, _ in asked]
    for refusal, (_, complaint) in zip(refusals, BAD, strict=True):
        assert isinstance(refusal, str) and complaint in refusal
    assert "unexpected inference input 'promt'" in unknown
