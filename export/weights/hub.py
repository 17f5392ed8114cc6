"""Repo ids in the place of folders: ORG/NAME[@REVISION], from the local cache of Hugging Face or downloaded into it."""

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
    """The folder that a path or repo id means; a text that is neither comes back as the path it would be."""
    given = Path(text)
    match = REPO.fullmatch(text)
    if given.exists() or not match or ".." in text or "--" in text:
        return given
    repo, revision = match[1], match[2] or "main"
    cache = _cache()
    snapshot = _snapshot(cache / f"models--{repo.replace('/', '--')}", revision)
    if snapshot and any(next(snapshot.rglob(kind), None) for kind in WEIGHTS):
        return snapshot
    if offline is None:
        offline = any(os.environ.get(f"{of}_OFFLINE", "").lower() in YES for of in ("HF_HUB", "TRANSFORMERS"))
    if offline:
        raise _refusal(text, repo, revision, f"not in {cache} either, and HF_HUB_OFFLINE forbids to look further")
    return _downloaded(text, repo, revision, cache)


def _cache() -> Path:
    """Where the library keeps what it downloads."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    home = Path(os.environ.get("HF_HOME") or usual)
    chosen = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or home / "hub"
    return Path(os.path.expandvars(chosen)).expanduser()


def _snapshot(repo: Path, revision: str) -> Path | None:
    """The folder of a revision, a branch or a whole commit, if it is there."""
    reference = repo / "refs" / revision
    commit = reference.read_text("utf-8", "replace").strip() if reference.is_file() else revision
    folder = repo / "snapshots" / commit
    return folder if COMMIT.fullmatch(commit) and folder.is_dir() else None


def _downloaded(text: str, repo: str, revision: str, cache: Path) -> Path:
    try:
        from huggingface_hub import snapshot_download

        made = snapshot_download(repo, revision=revision, cache_dir=str(cache), allow_patterns=list(KINDS))
    except Exception as error:  # of the network, the site, the disk, or of a package that is not there
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        complaint = f"not in {cache} either, and not to be had ({type(error).__name__}: {reason})"
        raise _refusal(text, repo, revision, complaint) from None
    return Path(made)


def _refusal(text: str, repo: str, revision: str, complaint: str) -> InputError:
    fetch = f"hf download {repo}" + ("" if revision == "main" else f" --revision {revision}")
    return InputError(one_line(f"weights {text}: no such file or folder, {complaint}; give a folder, or run {fetch}"))
