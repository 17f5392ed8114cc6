"""Limits of a service: the queue, time, memory, bodies, who may call; clients that hang up; bundles that change."""

import itertools
import os
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import numpy as np
import pytest

from support.endless import endless_bundle
from support.scenes import scene
from support.served import Served, pixels_of, png_of, served, until
from support.stepped import stepped
from tilewright.runtime import load
from tilewright.runtime.errors import EnvironmentMismatch, InputError, UsageError
from tilewright.runtime.serve.settings import Settings, listen, read_token

IMAGE = scene(24, 40)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return endless_bundle(tmp_path_factory.mktemp("endless") / "endless")


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stepped(tmp_path_factory.mktemp("steps") / "steps")


def hang(service: Served, **fields: str) -> socket.socket:
    """A client that has sent an image and waits."""
    request = httpx2.Request(
        "POST", f"{service.url}/v1/images/edits", files={"image": ("a", png_of(IMAGE))}, data=fields
    )
    body = request.read()
    lines = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    waiting = socket.create_connection(("127.0.0.1", request.url.port))
    waiting.sendall(f"POST /v1/images/edits HTTP/1.1\r\n{lines}\r\n".encode() + body)
    return waiting


@pytest.mark.parametrize("stream", ["false", "true"])
def test_a_client_that_hangs_up_cancels_its_work_and_a_full_queue_says_when_to_come_again(endless, stream) -> None:
    with served(endless, max_queue=1) as service:
        running = [hang(service, stream=stream) for _ in range(service.service.places)]
        until(lambda: len(service.service.running) == len(running), "they run")
        waiting = hang(service, stream=stream)
        until(lambda: len(service.service.queue) == 1, "it waits")
        answer = service.edit(IMAGE)
        assert answer.status_code == 429 and int(answer.headers["retry-after"]) >= 1
        assert answer.json()["error"]["code"] == "queue_full" and "1 requests wait" in answer.text
        waiting.close()
        until(lambda: not service.service.queue, "the one that waited is gone")
        for client in running:
            client.close()
        until(lambda: not service.service.running, "those that ran are gone")
        numbers = service.client.get("/metrics").text
        assert f'tilewright_images_total{{bundle="endless",end="cancelled"}} {len(running) + 1}.0' in numbers
        assert 'tilewright_refused_total{reason="queue"} 1.0' in numbers


@pytest.mark.slow
def test_a_request_that_is_late_is_cancelled(endless) -> None:
    with served(endless) as service:
        answer = service.edit(IMAGE, deadline_s=0.3)
        assert answer.status_code == 504 and "has not ended after 0.3 s" in answer.text
        until(lambda: not service.service.running, "it is cancelled")
        with service.client.stream(
            "POST", "/v1/images/edits", files={"image": png_of(IMAGE)}, data={"deadline_s": "0.3", "stream": "true"}
        ) as stream:
            assert '"code":"deadline_exceeded"' in stream.read().decode()
        running = [hang(service) for _ in range(service.service.places)]
        until(lambda: len(service.service.running) == len(running), "they run")
        assert service.edit(IMAGE, deadline_s=0.2).status_code == 504  # in the queue
        assert not service.service.queue


@pytest.mark.slow
def test_a_service_that_drains_finishes_what_it_accepted_and_refuses_the_rest(steps) -> None:
    with served(steps) as service, ThreadPoolExecutor(6) as pool, load(steps, threads=1) as restorer:
        images = [scene(100 + i, 160) for i in range(6)]
        answers = [pool.submit(service.edit, image) for image in images]
        until(lambda: len(service.service.queue) + len(service.service.running) >= 4, "some are accepted")
        accepted = {*service.service.queue, *service.service.running}
        service.service.drain()
        refused = service.edit(IMAGE)
        assert refused.status_code == 503 and refused.headers["retry-after"] and "is stopping" in refused.text
        assert service.client.get("/v2/health/ready").status_code == 503
        assert service.client.get("/v2/health/live").status_code == 200
        good = 0
        for image, future in zip(images, answers, strict=True):
            if (answer := future.result()).status_code == 200:
                assert np.array_equal(pixels_of(answer), restorer(image))
                good += 1
        assert good >= len(accepted)


@pytest.mark.slow
def test_memory_is_kept_in_a_ledger(steps) -> None:
    image = scene(120, 160)
    with served(steps) as service:
        bundle = service.service.bundles.served["steps"]
        needed = service.service.room_for(bundle, (160, 120), {}, layers=0, file=len(png_of(image)))[2]
        idle = service.service.held
    with served(steps, memory_limit=idle + int(1.9 * needed)) as service:
        ledger = service.service
        answer = service.edit(np.zeros((600, 600, 3), np.uint8))
        assert answer.status_code == 413 and answer.json()["error"]["code"] == "image_too_large"
        assert "the result of 600x600 px needs about" in answer.text
        held, seen = [], threading.Event()

        def watch() -> None:
            while not seen.wait(0.001):
                held.append((ledger.held, len(ledger.running)))

        watcher = threading.Thread(target=watch)
        watcher.start()
        with ThreadPoolExecutor(6) as pool:
            answers = [*pool.map(service.edit, [image] * 6)]
        seen.set()
        watcher.join()
        assert {a.status_code for a in answers} == {200}
        assert idle < max(size for size, _ in held) <= ledger.limit and ledger.held == idle
        assert max(running for _, running in held) == 1  # two of them do not fit


def test_bundles_are_opened_when_needed_and_the_longest_unused_makes_room(steps, tmp_path) -> None:
    paths = [shutil.copytree(steps, tmp_path / name) for name in "abc"]
    with served(*paths) as service:
        bundles = service.service.bundles
        base = bundles.served["a"].base_bytes
    with served(*paths, memory_limit=80_000_000 + int(2.9 * base)) as service:

        def opened() -> list[str]:
            return [m["id"] for m in service.client.get("/v1/models").json()["data"] if m["open"]]

        assert opened() == ["a"]
        for model, expected in [("b", "ab"), ("a", "ab"), ("c", "ac"), ("b", "bc")]:
            assert service.edit(IMAGE, model=model).status_code == 200
            assert opened() == list(expected), model
        numbers = service.client.get("/metrics").text
        assert 'tilewright_bundle_open{bundle="a"} 0.0' in numbers
        assert (
            'tilewright_device_busy_seconds_total{bundle="a",device="cpu:0"}' in numbers
        )  # that of closed ones counts


def test_a_bundle_that_changes_is_read_again_and_a_damaged_one_refuses(steps, tmp_path, caplog) -> None:
    root, other = shutil.copytree(steps, tmp_path / "b"), stepped(tmp_path / "other", gain=1.0)
    with served(root) as service, load(root, threads=1) as before, load(other, threads=1) as after:
        old, new = before(IMAGE), after(IMAGE)
        assert np.array_equal(pixels_of(service.edit(IMAGE)), old) and not np.array_equal(old, new)
        graph = (root / "step.onnx").read_bytes()
        os.utime(root / "step.onnx")  # it looks changed
        assert np.array_equal(pixels_of(service.edit(IMAGE)), old)
        assert not [record for record in caplog.records if record.levelname == "WARNING"]
        (root / "step.onnx").write_bytes(graph[:-1] + b"x")
        answer = service.edit(IMAGE)
        assert answer.status_code == 503 and "has changed and cannot be used" in answer.text, answer.text
        (root / "step.onnx").write_bytes(graph)
        assert np.array_equal(pixels_of(service.edit(IMAGE)), old)
        shutil.copytree(other, root, dirs_exist_ok=True)
        assert np.array_equal(pixels_of(service.edit(IMAGE)), new)
        assert any("is replaced by" in record.message for record in caplog.records)
        assert service.client.get("/v1/models/b").json()["digest"] == after.bundle.digest
        assert not service.service.bundles.outdated and service.service.held < 300 << 20


def test_a_bundle_that_changes_while_it_is_in_use_gives_no_picture(steps, tmp_path, monkeypatch) -> None:
    root = shutil.copytree(steps, tmp_path / "b")
    with served(root) as service:
        restorer = service.service.bundles.served["b"].restorer
        sitting = restorer.sitting

        def changed(*arguments, **options):
            (root / "show.onnx").write_bytes(b"")
            return sitting(*arguments, **options)

        monkeypatch.setattr(restorer, "sitting", changed)
        answer = service.edit(IMAGE)
        assert answer.status_code == 503 and "changed while it was in use" in answer.text


def test_bodies_are_limited_before_and_while_they_are_read(steps) -> None:
    with served(steps, max_body=10_000, upload_s=0.5) as service:
        assert service.edit(bytes(20_000)).status_code == 413
        part = b'--x\r\ncontent-disposition: form-data; name="image"; filename="i.png"\r\n\r\n'
        kind = {"content-type": "multipart/form-data; boundary=x"}
        endless = itertools.chain([part], (bytes(1000) for _ in range(1000)))  # without a length
        answer = service.client.post("/v1/images/edits", content=endless, headers=kind)
        assert answer.status_code == 413 and "over the limit of 10000 bytes" in answer.text
        with socket.create_connection(("127.0.0.1", service.client.base_url.port)) as slow:
            slow.sendall(b"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9000\r\n")
            slow.sendall(b"content-type: multipart/form-data; boundary=x\r\n\r\n--x")
            assert slow.recv(100).startswith(b"HTTP/1.1 408 ")


def test_only_so_many_bodies_may_come_at_a_time(steps) -> None:
    with served(steps, max_queue=0) as service:
        service.service.places = 1
        with socket.create_connection(("127.0.0.1", service.client.base_url.port)) as slow:
            slow.sendall(b"POST /v1/images/edits HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 9000\r\n")
            slow.sendall(b"content-type: multipart/form-data; boundary=x\r\n\r\n--x")
            until(lambda: service.edit(IMAGE).status_code == 429, "no further upload has room")
        until(lambda: service.edit(IMAGE).status_code == 200, "the one that came has gone")


def test_only_those_with_the_token_may_call(steps) -> None:
    with served(steps, token=b"secret-1") as service:
        for headers in ({}, {"authorization": "Bearer secret-2"}, {"authorization": "Basic secret-1"}):
            for path in ("/v1/models", "/metrics", "/v1/images/edits", "/nowhere"):
                answer = service.client.get(path, headers=headers)
                assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert service.client.get("/v1/models", headers={"authorization": "Bearer secret-1"}).status_code == 200
        assert service.client.get("/v2/health/ready").status_code == service.client.get("/").status_code == 200


def test_pages_of_other_sites_and_other_names_may_not_call(steps) -> None:
    with served(steps, hosts=("127.0.0.1", "localhost")) as service:
        get = service.client.get
        assert get("/v1/models", headers={"origin": service.url}).status_code == 200
        assert get("/v1/models", headers={"origin": "http://evil.example"}).status_code == 403
        assert get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_a_token_file_must_be_private_and_hold_one_word(tmp_path) -> None:
    file = tmp_path / "token"
    with pytest.raises(InputError, match="cannot be read"):
        read_token(file)
    file.write_text("secret\n")
    file.chmod(0o644)
    with pytest.raises(UsageError, match=r"can be read by others \(mode 644\); run chmod 600 on it"):
        read_token(file)
    file.chmod(0o600)
    assert read_token(file) == b"secret"
    for text in ("", "two words", "x" * 5000, "ü"):
        file.write_text(text)
        with pytest.raises(UsageError, match="one word of visible ASCII"):
            read_token(file)


def test_a_port_in_use_and_two_bundles_of_one_name_are_refused(tmp_path) -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(EnvironmentMismatch, match=f"127.0.0.1 port {port} cannot be used .*another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(EnvironmentMismatch, match="another --host or --port"):
        listen("192.0.2.1", 0)
    with pytest.raises(UsageError, match="two bundles are named 'b'"):
        Settings([tmp_path / "1" / "b", tmp_path / "2" / "b"])


def test_the_log_leaves_out_probes_that_have_nothing_to_say(steps, caplog) -> None:
    caplog.set_level("INFO", "tilewright")
    with served(steps) as service:
        for path in ("/v2/health/live", "/v2/health/ready", "/metrics", "/v1/models"):
            assert service.client.get(path).status_code == 200
        service.service.drain()
        assert service.client.get("/v2/health/ready").status_code == 503
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("GET ")]
    assert [line.partition(" in ")[0] for line in lines] == ["GET /v1/models 200", "GET /v2/health/ready 503"]


def test_a_device_that_hangs_ends_the_service(steps) -> None:
    with served(steps) as service:
        service.service.bundles.served["steps"].restorer.executor.hung.add(0)
        try:
            for path in ("/v2/health/live", "/v2/health/ready"):
                answer = service.client.get(path)
                assert answer.status_code == 503
                assert answer.text == "no device of steps answers; start the service anew\n"
            answer = service.edit(IMAGE)
            assert answer.status_code == 503 and "no device answers" in answer.text
        finally:
            service.service.bundles.served["steps"].restorer.executor.hung.clear()
        assert 'tilewright_faults_total{kind="DeviceError"} 1.0' in service.client.get("/metrics").text


def test_an_error_of_ours_shows_no_traceback(steps, monkeypatch, caplog) -> None:
    with served(steps) as service:
        monkeypatch.setattr(service.service.bundles.served["steps"].restorer, "sitting", lambda *a, **o: 1 / 0)
        answer = service.edit(IMAGE)
        assert answer.status_code == 500 and "its log says why" in answer.text and "division" not in answer.text
        assert "ZeroDivisionError" in caplog.text


def test_answers_are_sent_without_waiting_for_an_acknowledgement() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP  # by which asyncio decides to set TCP_NODELAY
