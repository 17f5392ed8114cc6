"""Copies of a bundle, for machines that do not have it."""

import logging
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

from tilewright.runtime.bundle.read import Bundle
from tilewright.runtime.cluster.answers import answers_of
from tilewright.runtime.cluster.worker import Place
from tilewright.runtime.errors import BundleError, amount

__all__ = ["provide"]

LOG = logging.getLogger("tilewright")
CHUNK = 16 * 2**20  # bytes of a file that are sent at once


def provide(ray: ModuleType, workers: Mapping[str, Place], bundle: Bundle, weights_dir: Path | None) -> None:
    """Let every worker read the bundle; machines that do not have it get a copy."""
    root, weights = str(bundle.root.absolute()), None if weights_dir is None else str(weights_dir.absolute())

    def found() -> dict[str, bool]:
        asked = {name: place.worker.find.remote(root, bundle.digest, weights) for name, place in workers.items()}
        answers: dict[str, bool] = answers_of(ray, asked)
        return answers

    lacking = [name for name, here in found().items() if not here]
    if not lacking:
        return
    receivers = {workers[name].node: workers[name].worker for name in lacking}
    files = dict(_files(bundle, weights_dir))
    size = sum(path.stat().st_size for path in files.values())
    LOG.warning("%d machines do not have the bundle; %s are sent to each", len(receivers), amount(size))
    tokens = {node: secrets.token_hex(4) for node in receivers}  # two machines may share a disk
    complete = False
    try:
        for name, path in files.items():
            with path.open("rb") as file:
                while data := file.read(CHUNK):
                    sent = ray.put(data)
                    receiving = {
                        node: worker.receive.remote(bundle.digest, tokens[node], name, sent)
                        for node, worker in receivers.items()
                    }
                    answers_of(ray, receiving)
        complete = True
    finally:
        for node, worker in receivers.items():
            answers_of(ray, {node: worker.end.remote(bundle.digest, tokens[node], complete=complete)})
    for name, here in found().items():
        if not here:
            raise BundleError(f"{name} cannot read the copy of {bundle.root} that was sent; is its disk full?")


def _files(bundle: Bundle, weights_dir: Path | None) -> Iterator[tuple[str, Path]]:
    """The files of a bundle and of its weights: their places in a copy, and here."""
    for name in ("bundle.json", *bundle.manifest.files):
        yield name, bundle.path(name)
    for name, folder in bundle.weights.folders.items():
        for file in folder.files:
            yield f"weights/{name}/{file}", bundle.folder(name, weights_dir) / file
