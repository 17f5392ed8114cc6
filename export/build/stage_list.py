"""The list of a request's stages, in order. Nothing is run, and weights are at most hashed."""

from collections.abc import Callable
from pathlib import Path

from tilewright.export.build.assembly import Assembly
from tilewright.export.build.cache import Stage
from tilewright.export.build.request import Request
from tilewright.export.build.stages import attach, constants, optimise, seal, trace, verify
from tilewright.runtime.bundle.digests import remembered_sha256, sha256_of_file

__all__ = ["all_remembered", "list_stages", "quick_digest"]


def list_stages(request: Request, digest: Callable[[Path], str] = sha256_of_file) -> list[Stage]:
    """The stages of a build of this request; `digest` gives the SHA-256 of a file."""
    attached = attach.stage(request, digest)
    computed = constants.stage(request, attached, digest)
    traced = trace.stage(request)
    optimised = optimise.stage(request, traced, attached)
    stages = [attached, computed, traced, optimised]
    assembly = Assembly(request, attached.directory, computed.directory, optimised.directory)
    if request.verify != "never":
        stages.append(verify.stage(assembly, {stage.name: stage for stage in stages}))
    return [*stages, seal.stage(assembly, {stage.name: stage for stage in stages})]


def quick_digest(path: Path) -> str:
    """A file's remembered digest, or else a key that no finished stage can have. The file is not read."""
    status = path.stat()
    return remembered_sha256(path) or f"not read yet, {path} {status.st_size} {status.st_mtime_ns}"


def all_remembered(request: Request) -> bool:
    """Whether the digests of all weights are remembered, so that none must be read."""
    files = (tensors.folder / file for tensors in request.tensors.values() for file in tensors.sources)
    return all(remembered_sha256(file) for file in files)
