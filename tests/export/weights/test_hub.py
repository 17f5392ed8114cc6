"""Repo ids: the snapshot that the local cache has, a download where it has none, or one line on how to fetch it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from tilewright.cli.export import _local, _option_values
from tilewright.export.weights.files import find
from tilewright.export.weights.hub import local
from tilewright.runtime.errors import InputError

COMMIT, OTHER = "0123456789abcdef" * 2 + "01234567", "f" * 40


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache in which the library would lay its files; whoever asks the network fails the test."""
    for name in ("HF_HOME", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    return tmp_path / "hub"


def cached(hub: Path, commit: str = COMMIT, *references: str, name: str = "model.safetensors") -> Path:
    """A snapshot of org/model as the library lays it out."""
    repo = hub / "models--org--model"
    (repo / "blobs").mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.ones(1)}, repo / "blobs" / f"{commit}-blob")
    for reference in references:
        (repo / "refs" / reference).parent.mkdir(parents=True, exist_ok=True)
        (repo / "refs" / reference).write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / name).symlink_to(Path("..", "..", "blobs", f"{commit}-blob"))
    return repo / "snapshots" / commit


def test_a_snapshot_in_the_cache_is_found_by_branch_tag_and_commit(hub):
    main, other = cached(hub, COMMIT, "main"), cached(hub, OTHER, "v1.0", "refs/pr/2")
    assert local("org/model") == local("org/model@main") == local(f"org/model@{COMMIT}") == main
    assert local("org/model@v1.0") == local("org/model@refs/pr/2") == local(f"org/model@{OTHER}") == other
    found = find(local("org/model"))
    assert (found.folder, list(found.sources)) == (main.resolve(), ["model.safetensors"])


@pytest.mark.parametrize("way", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME", "HOME"])
def test_the_cache_is_where_the_library_has_it(tmp_path, monkeypatch, way):
    monkeypatch.delenv("HF_HUB_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv(way, str(tmp_path / "x"))
    inner = {"HF_HOME": "hub", "XDG_CACHE_HOME": "huggingface/hub", "HOME": ".cache/huggingface/hub"}
    code = "import huggingface_hub.constants as c; print(c.HF_HUB_CACHE)"
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert theirs == str(tmp_path / "x" / inner.get(way, ""))
    snapshot = cached(Path(theirs), COMMIT, "main")
    assert local("org/model") == snapshot


def test_a_path_that_is_there_wins(hub, tmp_path):
    cached(hub, COMMIT, "main")
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert local("org/model") == Path("org/model")


@pytest.mark.parametrize(
    "text",
    ["model", "a/b/c", "/org/model", "org/", "../model", "org/..", "org/mo--del", "org/model@", "org/model@../x"],
)
def test_what_is_no_repo_id_stays_the_path_it_is(text):
    assert local(text) == Path(text)


@pytest.mark.parametrize("said", ["1", "true", "YES", "on"])
def test_offline_says_how_to_fetch(hub, monkeypatch, said):
    monkeypatch.setenv("HF_HUB_OFFLINE", said)
    with pytest.raises(InputError) as caught:
        local("org/model@v1.0")
    assert str(caught.value) == (
        f"weights org/model@v1.0: no such file or folder, not in {hub} either, and HF_HUB_OFFLINE forbids a download"
        "; give a folder, or run hf download org/model --revision v1.0"
    )
    with pytest.raises(InputError, match=r"hf download org/model$"):
        local("org/model")


def test_what_is_not_there_is_downloaded_into_the_cache(hub, monkeypatch):
    asked: list[Any] = []

    def download(repo: str, **options: Any) -> str:
        asked.append((repo, options))
        return str(cached(hub, COMMIT, "main"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    (hub / "models--org--model" / "snapshots" / OTHER).mkdir(parents=True)  # of which only the list was fetched
    made = local(f"org/model@{OTHER}")
    assert made == hub / "models--org--model" / "snapshots" / COMMIT
    ((repo, options),) = asked
    assert repo == "org/model" and options.pop("revision") == OTHER and options.pop("cache_dir") == str(hub)
    assert {"*.safetensors", "*.json", "*.bin"} <= set(options.pop("allow_patterns")) and not options
    assert local("org/model") == made and len(asked) == 1


def test_a_download_that_fails_is_one_line(monkeypatch):
    def fail(repo: str, **options: Any) -> str:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InputError) as caught:
        local("org/model")
    assert "the download failed (ConnectionError: no route); give a folder, or run hf download org/model" in str(
        caught.value
    )
    assert caught.value.exit_code == 8 and str(caught.value).isprintable()


def test_options_that_name_files_may_be_repo_ids_too_and_words_may_not(hub):
    snapshot = cached(hub, COMMIT, "main")
    assert _local("org/model:0.8") == f"{snapshot}:0.8" and _local("org/model") == str(snapshot)
    from tilewright.cli.commands import parse

    command = ["export", "build", "toksr", "--clip", "org/model", "--prompt", "org/model", "-o", "out"]
    given = _option_values(parse(command))
    assert given == {"clip": str(snapshot), "prompt": "org/model"}
