"""Jobs: their states, their results, and what a restart or a second service makes of them."""

import io
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.endless import endless_bundle
from support.scenes import scene
from support.served import Served, png_of, served, until
from support.stepped import stepped
from tilewright.runtime import load
from tilewright.runtime.errors import EnvironmentMismatch
from tilewright.runtime.execute.devices import CpuDevice
from tilewright.runtime.resume.checkpoint import share_in

IMAGE = scene(24, 40)
CALLS, HELD_AFTER = 24, 10  # of its 6 tiles in 3 steps and a last one
SHARE = HELD_AFTER / CALLS


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("bundles")
    return stepped(root / "steps"), endless_bundle(root / "endless")


def job_of(service: Served, image: np.ndarray | bytes = IMAGE, **fields: object) -> str:
    answer = service.edit(image, "/v1/jobs", **fields)
    assert answer.status_code == 202, answer.text
    job = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{job['id']}" and job["object"] == "job"
    return job["id"]


def ended(service: Served, job: str) -> dict[str, object]:
    until(lambda: service.client.get(f"/v1/jobs/{job}").json()["state"] in ("done", "failed"), "the job ends")
    return service.client.get(f"/v1/jobs/{job}").json()


def test_a_job_ends_with_the_picture_of_the_runtime(bundles) -> None:
    with served(*bundles) as service, load(bundles[0], threads=1) as restorer:
        job = job_of(service, lift=0.25, output_format="webp")
        state = ended(service, job)
        assert state["state"] == "done" and state["share"] == 1 and state["size"] == "40x24" and state["error"] is None
        assert state["expires_at"] - state["created_at"] in (86_400, 86_401)
        result = service.client.get(f"/v1/jobs/{job}/result")
        assert result.headers["content-type"] == "image/webp"
        pixels = np.asarray(Image.open(io.BytesIO(result.content)))
        assert np.array_equal(pixels, restorer(IMAGE, lift=0.25))
        assert service.client.delete(f"/v1/jobs/{job}").json()["deleted"]
        for path in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/result", "/v1/jobs/..%2Flock", "/v1/jobs/x"):
            assert service.client.get(path).status_code == 404
        folder = service.jobs.folder
        assert not [*(folder / "images").iterdir(), *(folder / "results").iterdir()]
    assert not folder.exists()  # it was a temporary one


def test_a_job_that_fails_says_why_and_wrong_ones_are_refused_at_once(bundles) -> None:
    with served(*bundles) as service:
        job = job_of(service, png_of(IMAGE)[:-100])
        state = ended(service, job)
        assert state["state"] == "failed" and "replace the damaged or cut file" in state["error"]["message"]
        result = service.client.get(f"/v1/jobs/{job}/result")
        assert result.status_code == 422 and "cannot be decoded" in result.text
        assert service.edit(IMAGE, "/v1/jobs", stream="true").status_code == 422
        assert service.edit(IMAGE, "/v1/jobs", lift=2).status_code == 422
        assert service.edit(b"x", "/v1/jobs").status_code == 415


def test_a_job_that_runs_can_be_watched_and_deleted_and_a_full_queue_takes_none(bundles) -> None:
    with served(bundles[1], max_queue=1) as service:
        jobs = [job_of(service) for _ in range(service.service.places)]
        until(lambda: len(service.service.running) == len(jobs), "they run")
        waiting = job_of(service)
        assert service.edit(IMAGE, "/v1/jobs").status_code == 429
        state = service.client.get(f"/v1/jobs/{jobs[0]}").json()
        assert state["state"] == "running" and state["share"] == 0 and state["left_s"] is None
        assert service.client.get(f"/v1/jobs/{waiting}").json()["state"] == "queued"
        answer = service.client.get(f"/v1/jobs/{waiting}/result")
        assert answer.status_code == 409 and answer.headers["retry-after"]
        for job in (waiting, *jobs):
            assert service.client.delete(f"/v1/jobs/{job}").status_code == 200
        until(lambda: not service.service.running and not service.service.queue, "they are cancelled")
        assert not [*(service.jobs.folder / "images").iterdir()]


def test_a_restart_loses_no_finished_job_and_goes_on_with_the_others(bundles, tmp_path) -> None:
    state_dir = tmp_path / "state"
    with served(*bundles, state_dir=state_dir) as service:
        done = job_of(service, lift=0.5)
        ended(service, done)
        before = service.client.get(f"/v1/jobs/{done}/result").content
        for _ in range(service.service.places):
            job_of(service, model="endless")
        until(lambda: len(service.service.running) == service.service.places, "they run")
        waiting = job_of(service, lift=0.75)
        with pytest.raises(EnvironmentMismatch, match="used by another service"), served(*bundles, state_dir=state_dir):
            pass
    # the stop has cancelled all that ran; a service without the endless bundle cannot go on with it
    with served(bundles[0], state_dir=state_dir) as service, load(bundles[0], threads=1) as restorer:
        assert service.client.get(f"/v1/jobs/{done}/result").content == before
        assert ended(service, waiting)["state"] == "done"
        result = service.client.get(f"/v1/jobs/{waiting}/result").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(result))), restorer(IMAGE, lift=0.75))
        failed = [dict(row) for row in service.jobs._run("SELECT status FROM jobs WHERE state = 'failed'")]
        assert failed == [{"status": 404}] * service.service.places
    with served(bundles[0], state_dir=state_dir, keep_s=0.001) as service:
        until(lambda: not [*(state_dir / "results").iterdir()], "results expire")
        assert service.client.get(f"/v1/jobs/{done}").status_code == 404


@dataclass
class Gate:
    """Holds a device after some calls, until it is opened."""

    calls: int = 0
    holds: threading.Event = field(default_factory=threading.Event)
    opened: threading.Event = field(default_factory=threading.Event)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, run = Gate(), CpuDevice.run

    def held(device: CpuDevice, *arguments: Any) -> Any:
        if gate.calls == HELD_AFTER and not gate.opened.is_set():
            gate.holds.set()
            assert gate.opened.wait(60)
        gate.calls += 1
        return run(device, *arguments)

    monkeypatch.setattr(CpuDevice, "run", held)
    return gate


@pytest.mark.parametrize("how", ["stopped", "killed", "damaged"])
def test_a_job_goes_on_from_its_finished_parts(bundles, tmp_path, gate, how) -> None:
    state_dir, later = tmp_path / "state", tmp_path / "later"
    with served(bundles[0], state_dir=state_dir, checkpoint_s=0.01 if how == "killed" else 0) as service:
        job = job_of(service, lift=0.75)
        assert gate.holds.wait(60)
        ticket, parts = service.jobs.requests[job].ticket, state_dir / "images" / f"{job}.resume"
        until(lambda: ticket.share() == SHARE, "the calls before it have ended")
        if how == "killed":  # what it leaves is what lies there
            until(lambda: share_in(parts) == SHARE, "all that is finished is kept")
            shutil.copytree(state_dir, later, ignore=shutil.ignore_patterns(".*.part"))  # kept a second time
        service.service.stop()
        until(lambda: not service.service.running, "it has stopped")
        gate.opened.set()
    if how != "killed":
        state_dir.rename(later)
    parts = later / "images" / f"{job}.resume"
    assert share_in(parts) == SHARE
    if how == "damaged":
        parts.write_bytes(parts.read_bytes()[:-1])
    parts.with_name(".0123.part").touch()  # of a file that was not complete
    before = gate.calls
    with served(bundles[0], state_dir=later) as service, load(bundles[0], threads=1) as restorer:
        state = ended(service, job)
        calls = gate.calls - before
        assert state["state"] == "done", state
        note = f"a restart of the service interrupted the job; {SHARE:.0%} was done before"
        assert state["notes"] == ([] if how == "damaged" else [note])
        assert calls == CALLS - (0 if how == "damaged" else HELD_AFTER)
        result = service.client.get(f"/v1/jobs/{job}/result").content
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(result))), restorer(IMAGE, lift=0.75))
        assert not [*(later / "images").iterdir()]


def test_a_job_that_is_deleted_while_it_runs_leaves_nothing(bundles, tmp_path, gate) -> None:
    with served(bundles[0], state_dir=tmp_path / "state") as service:
        job = job_of(service)
        assert gate.holds.wait(60)
        assert service.client.delete(f"/v1/jobs/{job}").status_code == 200
        until(lambda: not service.service.running, "it is cancelled")
        gate.opened.set()
    assert not [*(tmp_path / "state" / "images").iterdir()]


def test_a_folder_that_cannot_hold_jobs_is_refused(bundles, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    refused = pytest.raises(EnvironmentMismatch, match=r"cannot hold jobs .*another --state-dir")
    with refused, served(bundles[0], state_dir=tmp_path / "file"):
        pass
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "jobs.sqlite3").write_text("no database, and long enough to be looked at" * 9)
    with pytest.raises(EnvironmentMismatch, match="cannot hold jobs"), served(bundles[0], state_dir=tmp_path / "other"):
        pass


def test_a_job_that_is_late_fails(bundles) -> None:
    with served(bundles[1]) as service:
        job = job_of(service, deadline_s=0.3)
        state = ended(service, job)
        assert state["state"] == "failed" and "has not ended after 0.3 s" in state["error"]["message"]
        assert service.client.get(f"/v1/jobs/{job}/result").status_code == 504
