"""Jobs: requests whose results wait for their clients. A folder holds images and results, SQLite the rest.

After a restart of the service, results are still there, and jobs that had not ended go on from their finished parts.
"""

import contextlib
import json
import logging
import re
import secrets
import shutil
import sqlite3
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from typing import Any, BinaryIO

from tilewright.runtime.bundle.digests import writing
from tilewright.runtime.errors import EnvironmentMismatch, InputError, ResourceError, TilewrightError
from tilewright.runtime.images.read import image_size
from tilewright.runtime.serve.image_request import Answer, ImageRequest
from tilewright.runtime.serve.refusals import Refusal, refusal_of
from tilewright.runtime.serve.service import Service

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two services apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["Jobs"]

LOG = logging.getLogger("tilewright")
ID = re.compile(r"[A-Za-z0-9_-]{22}", re.ASCII)
LOOK_S = 60.0  # between two looks for results that have expired
SCHEMA = """CREATE TABLE IF NOT EXISTS jobs (
    id TEXT PRIMARY KEY, state TEXT NOT NULL, created REAL NOT NULL, ended REAL, fields TEXT NOT NULL,
    size TEXT NOT NULL, notes TEXT NOT NULL DEFAULT '[]', status INTEGER, error TEXT)"""
COLUMNS = "state, created, ended, fields, size, notes, status, error"
SIZES = ("tile", "overlap", "steps", "scale")


class Jobs:
    """The jobs of a service. Any thread may call it."""

    def __init__(self, service: Service) -> None:
        self.service, self.keep_s = service, service.settings.keep_s
        chosen = service.settings.state_dir
        self.temporary = chosen is None
        self.folder = Path(tempfile.mkdtemp(prefix="tilewright-jobs-")) if chosen is None else chosen
        self.lock = Lock()
        self.requests: dict[str, ImageRequest] = {}  # jobs that have not ended
        self.ended: SimpleQueue[str | None] = SimpleQueue()
        self._open()
        self.keeper = Thread(target=self._keep, name="jobs", daemon=True)
        self.keeper.start()
        self._go_on()

    def _open(self) -> None:
        """Open the folder for this service alone."""
        try:
            for name in ("images", "results"):
                (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
            self.locked = (self.folder / "lock").open("a")
            if fcntl:
                fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                for half in self.folder.glob("*/.*.part"):  # a service was killed while it wrote a file
                    half.unlink()
            self.base = sqlite3.connect(self.folder / "jobs.sqlite3", check_same_thread=False, isolation_level=None)
            (self.folder / "jobs.sqlite3").chmod(0o600)
            self.base.execute(SCHEMA)
            self.base.execute(f"SELECT {COLUMNS} FROM jobs LIMIT 0")  # an earlier version had others
        except BlockingIOError:
            raise EnvironmentMismatch(f"{self.folder} is used by another service; give each a --state-dir") from None
        except (OSError, sqlite3.Error) as error:
            reason = getattr(error, "strerror", None) or error
            raise EnvironmentMismatch(
                f"{self.folder} cannot hold jobs ({reason}); choose another --state-dir"
            ) from None

    def close(self) -> None:
        """Wait until the service has ended, store what it has done, and close the folder."""
        self.service.close()
        self.ended.put(None)
        self.keeper.join()
        self.base.close()
        self.locked.close()
        if self.temporary:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, request: ImageRequest) -> dict[str, Any]:
        """Accept a request as a job, and say where it is."""
        name = secrets.token_urlsafe(16)
        fields = {
            "model": request.model,
            "options": dict(request.options),
            "format": request.format,
            "seconds": request.seconds,
        }
        try:
            request.image = self._copy(request.image, self._image(name))
            request.mask = request.mask and self._copy(request.mask, self._mask(name))
            size = f"{request.width}x{request.height}"
            self._run(
                "INSERT INTO jobs (id, state, created, fields, size) VALUES (?, 'queued', ?, ?, ?)",
                (name, time.time(), json.dumps(fields), size),
            )
            self._begin(name, request, always=False)
        except BaseException as error:
            self._remove(name)
            if isinstance(error, (OSError, sqlite3.Error)):
                LOG.error("a job cannot be stored: %s", error)
                raise Refusal(503, "the service has no room for the job", "no_room", retry_s=60) from error
            raise
        return self.get(name)

    def get(self, name: str) -> dict[str, Any]:
        """The state of a job."""
        row = self._row(name)
        request = self.requests.get(name)
        progress = self.service.progress(request) if request else {}
        share = 1.0 if row["state"] == "done" else progress.get("share", 0.0)
        state = progress.get("state", row["state"]) if row["state"] == "queued" else row["state"]
        ended = row["ended"]
        fields = json.loads(row["fields"])
        return {
            "id": name,
            "object": "job",
            "state": "running" if state == "done" and row["state"] == "queued" else state,  # it is being stored
            "share": share,
            "left_s": progress.get("left_s"),
            "before": progress.get("before", 0),
            "model": fields["model"],
            "size": row["size"],
            "output_format": fields["format"],
            "created_at": int(row["created"]),
            "expires_at": None if ended is None else int(ended + self.keep_s),
            "notes": json.loads(row["notes"]),
            "error": json.loads(row["error"]) if row["error"] else None,
        }

    def result(self, name: str) -> tuple[Path, str]:
        """The file with the result of a job, and its format."""
        row = self._row(name)
        if row["state"] == "failed":
            error = json.loads(row["error"])
            raise Refusal(row["status"], error["message"], error["code"], error["param"])
        if row["state"] != "done":
            progress = self.service.progress(request) if (request := self.requests.get(name)) else {"left_s": None}
            retry_s = max(1, min(60, int(progress["left_s"] or 5)))
            raise Refusal(409, "the job has not ended; ask for its result later", "not_ended", retry_s=retry_s)
        return self._result(name), json.loads(row["fields"])["format"]

    def delete(self, name: str) -> None:
        """Cancel a job if it has not ended, and forget it."""
        self._row(name)
        request = self.requests.pop(name, None)
        self._remove(name)
        if request:
            self.service.cancel(request)

    def _go_on(self) -> None:
        """Begin again the jobs that had not ended when the service ended."""
        rows = self._run("SELECT id, fields FROM jobs WHERE state = 'queued' ORDER BY created").fetchall()
        for name, text in rows:
            try:
                self._begin(name, self._request(name, json.loads(text)), always=True)
            except (TilewrightError, Refusal, OSError) as error:
                self._fail(name, error)
        if rows:
            LOG.warning("%d jobs of an earlier service go on", len(rows))

    def _request(self, name: str, fields: dict[str, Any]) -> ImageRequest:
        model, options = fields["model"], fields["options"]
        if model not in self.service.bundles.roots:
            raise Refusal(404, f"bundle {model!r} is not served any more", "model_not_found", "model")
        image, mask = self._image(name), self._mask(name)
        sizes = {option: options[option] for option in SIZES if option in options}
        served = self.service.bundles.current(model)
        masked, size = mask.exists(), image.stat().st_size
        layers = masked + ("color" in options) + self._parts(name).exists()
        room = self.service.room_for(served, image_size(image), sizes, layers=layers, file=size)
        request = ImageRequest(model, image.open("rb"), *room, fields["format"], options, seconds=fields["seconds"])
        request.mask = mask.open("rb") if masked else None
        return request

    def _begin(self, name: str, request: ImageRequest, *, always: bool) -> None:
        self.requests[name] = request
        request.parts = None if self.temporary else self._parts(name)

        def ended(future: "Future[Answer]") -> None:
            self.ended.put(name)

        self.service.accept(request, always=always)
        request.future.add_done_callback(ended)
        self.ended.put("")  # the keeper looks when this job will be late

    def _keep(self) -> None:
        """Store results as they come, and remove those that have expired."""
        while True:
            self._expire()
            try:
                name = self.ended.get(timeout=self._cancel_late())
            except Empty:
                continue
            if name is None:
                return
            if (request := self.requests.get(name)) is None:
                if name:  # it was deleted, and has kept its finished parts since
                    self._remove(name)
                continue
            self._store(name, request)
            self.requests.pop(name, None)
            request.image.close()
            del request

    def _cancel_late(self) -> float:
        """Cancel the jobs whose time is over; the seconds until the next look."""
        now = time.monotonic()
        ends = {request: request.ends for request in list(self.requests.values()) if not request.late}
        for request in [request for request, end in ends.items() if end <= now]:
            self.service.cancel(request, late=True)
        return min([LOOK_S, *(end - now for end in ends.values() if end > now)])

    def _store(self, name: str, request: ImageRequest) -> None:
        if error := request.future.exception():
            if request.late or request.state != "cancelled":  # what a stop has cancelled begins again later
                self._fail(name, error)
            return
        answer = request.future.result()
        try:
            with writing(self._result(name), 0o600) as temporary:
                temporary.write_bytes(answer.data)
            notes = json.dumps(answer.notes)
            sql = "UPDATE jobs SET state = 'done', ended = ?, notes = ? WHERE id = ?"
            if not self._run(sql, (time.time(), notes, name)).rowcount:
                self._remove(name)  # deleted meanwhile
        except (OSError, sqlite3.Error) as problem:
            LOG.error("the result of a job cannot be stored: %s", problem)
            self._fail(name, ResourceError("the service has no room for the result; send the job again"))
        self._remove_sources(name)

    def _fail(self, name: str, error: BaseException) -> None:
        refusal = Refusal(422, str(error), "invalid_value") if isinstance(error, InputError) else refusal_of(error)
        body = json.dumps(refusal.body["error"])
        sql = "UPDATE jobs SET state = 'failed', ended = ?, status = ?, error = ? WHERE id = ?"
        with contextlib.suppress(sqlite3.Error):
            self._run(sql, (time.time(), refusal.status, body, name))
        self._remove_sources(name)

    def _expire(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            old = self._run("SELECT id FROM jobs WHERE ended < ?", (time.time() - self.keep_s,)).fetchall()
            for (name,) in old:
                self._remove(name)

    def _row(self, name: str) -> sqlite3.Row:
        row = None
        if ID.fullmatch(name):
            row = self._run(f"SELECT {COLUMNS} FROM jobs WHERE id = ?", (name,)).fetchone()
        if row is None or (row["ended"] is not None and row["ended"] < time.time() - self.keep_s):
            raise Refusal(404, "there is no such job; it was deleted, or its result has expired", "job_not_found")
        found: sqlite3.Row = row
        return found

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        with self.lock:
            self.base.row_factory = sqlite3.Row
            return self.base.execute(sql, values)

    def _remove(self, name: str) -> None:
        self.requests.pop(name, None)
        with contextlib.suppress(sqlite3.Error):
            self._run("DELETE FROM jobs WHERE id = ?", (name,))
        self._remove_sources(name)
        self._result(name).unlink(missing_ok=True)

    def _remove_sources(self, name: str) -> None:
        """Remove all that only a job that has not ended needs."""
        for path in (self._image(name), self._mask(name), self._parts(name)):
            path.unlink(missing_ok=True)

    def _copy(self, source: BinaryIO, target: Path) -> BinaryIO:
        """A copy of an uploaded file, which stays when the request has ended."""
        source.seek(0)
        with writing(target, 0o600) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(source, file)
        return target.open("rb")

    def _image(self, name: str) -> Path:
        return self.folder / "images" / name

    def _mask(self, name: str) -> Path:
        return self.folder / "images" / f"{name}.mask"

    def _parts(self, name: str) -> Path:
        return self.folder / "images" / f"{name}.resume"

    def _result(self, name: str) -> Path:
        return self.folder / "results" / name
