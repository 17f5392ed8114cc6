"""The digest of a bundle's networks, by which statistics and recipes know the bundle they are of."""

import json

from tilewright.runtime.bundle.digests import sha256_of_bytes
from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.bundle.strict import encode
from tilewright.runtime.errors import InputError

__all__ = ["check_networks", "networks_digest"]


def networks_digest(bundle: Bundle) -> str:
    """The digest of a bundle without its engines: adding an engine does not change it."""
    manifest, weights = bundle.manifest, bundle.weights
    names = [manifest.program, *(c.graph for c in manifest.components.values())]
    names += [manifest.constants] if manifest.constants else []
    tables = {name: weights.tensors.get(name, {}) for name in manifest.components}
    used = {r.folder: weights.folders[r.folder].files for table in tables.values() for r in table.values()}
    parts = [{name: encode(manifest.files[name]) for name in names}, encode(tables), encode(used)]
    return sha256_of_bytes(json.dumps(parts, sort_keys=True).encode())


def check_networks(bundle: Bundle, digest: str, where: str) -> None:
    """Refuse a file that was made of another bundle."""
    if digest != networks_digest(bundle):
        raise InputError(f"{where} is of another bundle than {bundle.root}; collect statistics of this one")
