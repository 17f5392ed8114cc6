"""The stages of a request, in order. Nothing is run, and weights are at most hashed."""

from collections.abc import Callable
from pathlib import Path

from tilewright.export.build.assembly import Assembly
from tilewright.export.build.cache import Stage
from tilewright.export.build.request import Request
from tilewright.export.build.stages import attach, constants, optimise, seal, trace, verify
from tilewright.runtime.bundle.digests import remembered_sha256, sha256_of_file

__all__ = ["all_remembered", "quick_digest", "stages"]


def stages(request: Request, digest: Callable[[Path], str] = sha256_of_file) -> list[Stage]:
    """What a build of this request runs; `digest` says which bytes a file holds."""
    attached = attach.stage(request, digest)
    computed = constants.stage(request, attached, digest)
    traced = trace.stage(request)
    optimised = optimise.stage(request, traced, attached)
    plan = [attached, computed, traced, optimised]
    assembly = Assembly(request, attached.directory, computed.directory, optimised.directory)
    if request.verify != "never":
        plan.append(verify.stage(assembly, {stage.name: stage for stage in plan}))
    return [*plan, seal.stage(assembly, {stage.name: stage for stage in plan})]


def quick_digest(path: Path) -> str:
    """A file's digest if it is remembered, and otherwise a key that no finished stage has: nothing is read."""
    status = path.stat()
    return remembered_sha256(path) or f"not read yet, {path} {status.st_size} {status.st_mtime_ns}"


def all_remembered(request: Request) -> bool:
    """Whether no weights have to be read to know the stages."""
    files = (tensors.folder / file for tensors in request.tensors.values() for file in tensors.sources)
    return all(remembered_sha256(file) for file in files)
