"""Reading a bundle: a directory with a manifest, a program, graphs and references to weights.

All files that the runtime reads are listed in `bundle.json` with size and SHA-256. Weights are listed in `weights.json`
and may lie outside of the bundle. `reports/` and `README.md` are not sealed. They are for people, except for
`reports/measured.json`, by which the runtime chooses among the engines.
"""

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tilewright.runtime.bundle.arguments import Argument, arguments_of
from tilewright.runtime.bundle.check import check_program
from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.files import bytes_of, check_files, check_inside, is_file, refusals_in_one_line
from tilewright.runtime.bundle.manifest import SCHEMA_VERSION, Manifest, named_files, read_manifest
from tilewright.runtime.bundle.program import Program, Signature
from tilewright.runtime.bundle.safetensors import safetensors_header
from tilewright.runtime.bundle.strict import from_json, one_line, schema
from tilewright.runtime.bundle.weights import Weights, check_graphs, check_weights, checked_folder, location
from tilewright.runtime.errors import BundleError, UsageError

__all__ = ["PIN", "Bundle", "json_schema", "read_bundle", "require_bundle"]

LOG = logging.getLogger("tilewright")


PIN = re.compile("[0-9a-f]{12,64}")  # enough digits of a digest to tell bundles apart


@dataclass(frozen=True)
class Bundle:
    """A bundle that has been read and checked."""

    root: Path
    manifest: Manifest
    program: Program
    weights: Weights
    digest: str  # SHA-256 of the manifest, which contains the digests of all other files
    fresh: bool = False  # digests of weights are computed, not remembered
    _checked: dict[tuple[str, Path | None], Path] = field(default_factory=dict, repr=False, compare=False)

    @property
    def arguments(self) -> dict[str, Argument]:
        """The arguments that a caller may set: words, then files, then single values."""
        return arguments_of(self.program)

    def path(self, name: str) -> Path:
        """The path of a sealed file."""
        return self.root / name

    def folder(self, name: str, weights_dir: Path | None = None) -> Path:
        """The current place of a folder of weights, checked: packed, under `weights_dir`, or its place at build."""
        checked = self._checked.get((name, weights_dir))
        if checked and self.fresh:  # gigabytes are read only once
            return checked
        folder = self.weights.folders[name]
        weights_folder = checked_folder(weights_dir)
        under = (
            [weights_folder / name, weights_folder, *sorted(weights_folder.glob(f"*/{name}"))] if weights_folder else []
        )
        candidates = [self.root / "weights" / name, *under, *([Path(folder.path)] if folder.path else [])]
        wrong: BundleError | None = None
        for candidate in candidates:
            if all(is_file(candidate / file) for file in folder.files):
                try:
                    check_files(candidate, folder.files, "give the folder this bundle was built from", self.fresh)
                except BundleError as error:  # files of another folder may have the same names
                    wrong = wrong or error
                    continue
                if weights_folder and candidate not in under and not checked:
                    named, used = one_line(str(weights_folder)), one_line(str(candidate))
                    LOG.warning("weights of %r: %s is used, not %s; see --weights-dir", name, used, named)
                self._checked[name, weights_dir] = candidate
                return candidate
        if wrong is not None:
            raise wrong
        names = one_line(", ".join(sorted(folder.files)[:3]))
        searched = ", ".join(one_line(str(candidate)) for candidate in candidates)
        raise BundleError(
            f"{self.root}: weights {names} of {name!r} are in none of {searched};"
            " pass --weights-dir, or rebuild with --pack"
        )

    def files_of(self, table: str, weights_dir: Path | None = None) -> dict[str, Path]:
        """Location in the graphs that read a table of weights -> the current path of the file."""
        references = self.weights.tensors.get(table, {}).values()
        folders = {name: self.folder(name, weights_dir) for name in self.weights.folders_of(table)}
        return {location(r): folders[r.folder] / r.file for r in references}


@refusals_in_one_line()
def require_bundle(root: Path) -> None:
    """Refuse a place that is no bundle at all. No file is read."""
    if not is_file(root / "bundle.json"):
        raise BundleError(f"{root}: no bundle.json there; give the directory that 'tilewright export build' made")


@refusals_in_one_line()
def read_bundle(root: str | os.PathLike[str], *, expect: str | None = None, fresh: bool = False) -> Bundle:
    """Read a bundle and check all sealed files and the program. A bad one is refused in one line.

    `expect`: accept only the bundle with this digest; 12 digits are enough. `fresh`: also read files with a remembered
    digest.
    """
    root = Path(root)
    require_bundle(root)
    where = str(root / "bundle.json")
    text = bytes_of(root / "bundle.json")
    digest = sha256_of_bytes(text)
    _check_pin(digest, expect, where)
    manifest = read_manifest(text, where)
    for name in [*manifest.files, *named_files(manifest)]:
        check_inside(root, name, where)
        if name not in manifest.files:
            raise BundleError(f"{where}: {name!r} is used but not listed under files; rebuild the bundle")
    check_files(root, manifest.files, "rebuild the bundle, or copy it again", fresh)
    program = from_json(Program, bytes_of(root / manifest.program), str(root / manifest.program))
    constants = safetensors_header(root / manifest.constants) if manifest.constants else {}
    signatures = {name: Signature(c.inputs, c.outputs) for name, c in manifest.components.items()}
    try:
        check_program(program, signatures, {name: spec for name, (spec, _, _) in constants.items()})
    except BundleError as error:
        raise BundleError(f"{root / manifest.program}: {str(error).removeprefix('program: ')}") from None
    if differing := _differing(manifest.arguments, arguments_of(program)):
        raise BundleError(f"{where}: argument {differing!r} differs from {manifest.program}; rebuild the bundle")
    tokenizers = {file for text in program.texts.values() for file in text.ids.values()}
    if unlisted := sorted(tokenizers - set(manifest.tokenizers)):
        raise BundleError(f"{root / manifest.program}: tokenizer {unlisted[0]!r} is not listed; rebuild the bundle")
    weights = from_json(Weights, bytes_of(root / manifest.weights), str(root / manifest.weights))
    check_weights(weights, manifest, root)
    check_graphs(weights, manifest, root)
    return Bundle(root, manifest, program, weights, digest, fresh)


def _differing(listed: Mapping[str, Argument], arguments: Mapping[str, Argument]) -> str | None:
    """The first argument that differs between manifest and program."""
    names = sorted(listed.keys() | arguments.keys())
    return next((name for name in names if listed.get(name) != arguments.get(name)), None)


def _check_pin(digest: str, expect: str | None, where: str) -> None:
    if expect is None:
        return
    if not PIN.fullmatch(expect.lower()):
        raise UsageError(f"--expect {one_line(expect)!r} is no digest; give 12 to 64 hexadecimal digits of one")
    if not digest.startswith(expect.lower()):
        raise BundleError(f"{where}: SHA-256 {digest} is not the expected {expect}; get the bundle you pinned")


def json_schema() -> dict[str, object]:
    """The JSON Schemas of the three documents of a bundle."""
    kinds = {"bundle.json": Manifest, "program.json": Program, "weights.json": Weights}
    return {name: schema(kind, f"Tilewright {name}, schema {SCHEMA_VERSION}") for name, kind in kinds.items()}
