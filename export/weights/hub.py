"""Repo ids ORG/NAME[@REVISION] as folders: from the local cache of Hugging Face, or downloaded into it."""

import os
import re
from pathlib import Path

from tilewright.runtime.bundle.strict import one_line
from tilewright.runtime.errors import InputError

__all__ = ["local"]

PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"
REPO = re.compile(rf"({PART}/{PART})(?:@([\w.-]+(?:/[\w.-]+)*))?", re.ASCII)
COMMIT = re.compile("[0-9a-f]{40}")
YES = ("1", "true", "yes", "on")
KINDS = ("*.json", "*.safetensors", "*.bin", "*.pt", "*.txt", "*.model")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt")


def local(text: str, offline: bool | None = None) -> Path:
    """The folder of a path or a repo id. Any other text is returned as a path, which then does not exist."""
    path = Path(text)
    match = REPO.fullmatch(text)
    if path.exists() or not match or ".." in text or "--" in text:
        return path
    repo, revision = match[1], match[2] or "main"
    cache = _cache()
    snapshot = _snapshot(cache / f"models--{repo.replace('/', '--')}", revision)
    if snapshot and any(next(snapshot.rglob(kind), None) for kind in WEIGHTS):
        return snapshot
    if offline is None:
        offline = any(os.environ.get(f"{library}_OFFLINE", "").lower() in YES for library in ("HF_HUB", "TRANSFORMERS"))
    if offline:
        raise _refusal(text, repo, revision, f"not in {cache} either, and HF_HUB_OFFLINE forbids a download")
    return _downloaded(text, repo, revision, cache)


def _cache() -> Path:
    """The folder where Hugging Face's library keeps its downloads."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or usual)
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(os.path.expandvars(chosen)).expanduser()


def _snapshot(repo: Path, revision: str) -> Path | None:
    """The folder of a revision (a branch or a full commit id) in the cache, or none."""
    reference = repo / "refs" / revision
    commit = reference.read_text("utf-8", "replace").strip() if reference.is_file() else revision
    folder = repo / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _downloaded(text: str, repo: str, revision: str, cache: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo, revision=revision, cache_dir=str(cache), allow_patterns=list(KINDS))
    except Exception as error:  # the network, the site, the disk or a missing package
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        complaint = f"not in {cache} either, and the download failed ({type(error).__name__}: {reason})"
        raise _refusal(text, repo, revision, complaint) from None
    return Path(folder)


def _refusal(text: str, repo: str, revision: str, complaint: str) -> InputError:
    fetch = f"hf download {repo}" + ("" if revision == "main" else f" --revision {revision}")
    return InputError(one_line(f"weights {text}: no such file or folder, {complaint}; give a folder, or run {fetch}"))
