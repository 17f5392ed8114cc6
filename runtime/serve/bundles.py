"""The bundles of a service: opened when they are first needed, and closed to make room for others.

A bundle whose files change is read again before its next use. A bundle that is damaged then refuses requests, until it
is whole again.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Condition, Lock
from typing import Any

from tilewright.runtime.bundle.read import Bundle, read_bundle
from tilewright.runtime.errors import BundleError, TilewrightError
from tilewright.runtime.memory.estimate import INTERPRETER_BYTES, Estimate, estimate
from tilewright.runtime.restore import Restorer, load
from tilewright.runtime.serve.settings import Settings, name_of
from tilewright.runtime.setup import Setup, set_up

__all__ = ["Bundles", "ServedBundle"]

LOG = logging.getLogger("tilewright")
SETUP = ("engine", "devices", "threads", "batch")  # the options of `load` that choose engines
Seal = tuple[tuple[str, int, int, int, int], ...]
_turns = itertools.count()


@dataclass(eq=False)
class ServedBundle:
    """A bundle as it is at present, with its engines if they are open."""

    name: str
    bundle: Bundle
    setup: Setup
    seal: Seal
    options: Mapping[str, Any]  # of `load`
    limit: int  # bytes that everything may take
    restorer: Restorer | None = None
    held: int = 0  # bytes in the ledger for its engines
    users: int = 0  # requests that run with it
    turn: int = 0  # of its last use
    outdated: bool = False  # its files have changed; it is closed after its last user
    opening: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        self.base_bytes = self.estimate(1, 1).needed_bytes - INTERPRETER_BYTES  # of its engines

    @property
    def created(self) -> int:
        """When its manifest was written, in seconds since 1970."""
        return self.seal[0][2] // 10**9

    def estimate(self, width: int, height: int, **sizes: Any) -> Estimate:
        """What an image of this size needs with the engines. Only arithmetic."""
        return estimate(
            self.setup.bundle,
            width,
            height,
            memory=self.options.get("memory", "fast"),
            devices=len(self.setup.devices),
            shared=self.setup.shared,
            elsewhere=self.options.get("cluster") is not None,
            memory_limit=self.limit,
            engines=self.setup.specs,
            **sizes,
        )

    def open(self) -> Restorer:
        """The restorer, opened now if it is not."""
        with self.opening:
            if self.restorer is None:
                self.restorer = load(self.bundle, memory_limit=self.limit, **self.options)
                LOG.info("%s is open: %s", self.name, self.bundle.digest[:12])
            return self.restorer

    def close(self) -> None:
        """Close the engines, and free their memory."""
        with self.opening:
            if self.restorer is not None:
                self.restorer.close()
                self.restorer = None

    def require_same(self) -> None:
        """Refuse what was computed while files of the bundle changed."""
        if seal_of(self.bundle) != self.seal:
            raise BundleError(f"bundle {self.name!r} changed while it was in use; send the request again")


class Bundles:
    """The bundles of a service by name. The service's lock guards `served`, `held`, `users` and `turn`."""

    def __init__(self, settings: Settings, limit: int, lock: Condition) -> None:
        self.options, self.limit, self.lock = dict(settings.engines), limit, lock
        self.roots = {name_of(path): path for path in settings.bundles}
        self.reading = Lock()
        self.served = {name: self._read(name) for name in self.roots}
        self.outdated: list[ServedBundle] = []  # in use, and replaced by another

    def _read(self, name: str) -> ServedBundle:
        """Read a bundle, and choose its engines. Nothing is opened."""
        bundle = read_bundle(self.roots[name])
        seal = seal_of(bundle)
        setup = set_up(bundle, **{name: value for name, value in self.options.items() if name in SETUP})
        return ServedBundle(name, bundle, setup, seal, self.options, self.limit)

    def current(self, name: str) -> ServedBundle:
        """The bundle of this name, read again if its files have changed."""
        served = self.served[name]
        if seal_of(served.bundle) == served.seal:
            return served
        with self.reading:
            served = self.served[name]
            if (seal := seal_of(served.bundle)) == served.seal:  # another thread has read it
                return served
            try:
                fresh = self._read(name)
                for folder in fresh.bundle.weights.folders:
                    fresh.bundle.folder(folder, self.options.get("weights_dir"))  # checks the files of weights
            except TilewrightError as error:
                raise BundleError(f"bundle {name!r} has changed and cannot be used: {error}") from error
            if fresh.bundle.digest == served.bundle.digest and seal == fresh.seal:
                served.seal, served.bundle = fresh.seal, fresh.bundle  # files were touched and are the same
                return served
            old, new = served.bundle.digest[:12], fresh.bundle.digest[:12]
            LOG.warning("bundle %r has changed: %s is replaced by %s", name, old, new)
            with self.lock:
                served.outdated = True
                self.outdated += [served] if served.held else []
                self.served[name] = fresh
            return fresh

    def idle(self, other_than: ServedBundle | None = None) -> Iterable[ServedBundle]:
        """The open bundles that no request uses, the longest unused first."""
        idle = [b for b in self.all() if b.held and not b.users and b is not other_than]
        return sorted(idle, key=lambda served: (not served.outdated, served.turn))

    def all(self) -> Sequence[ServedBundle]:
        """All bundles that may be open."""
        return [*self.outdated, *self.served.values()]

    def took(self, served: ServedBundle) -> None:
        """Count a user of a bundle."""
        served.users += 1
        served.turn = next(_turns)


def seal_of(bundle: Bundle) -> Seal:
    """Size, times and inode of every file that the engines read. They differ after any change."""
    files = [bundle.root / name for name in ("bundle.json", *bundle.manifest.files)]
    for name, folder in bundle.weights.folders.items():
        places = [bundle.root / "weights" / name, *([Path(folder.path)] if folder.path else [])]
        files += [place / file for place in places for file in folder.files]
    return tuple(_identity(file) for file in files)


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    try:
        status = path.stat()
    except OSError:
        return str(path), 0, 0, 0, 0
    return str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino
