"""The connection to a worker of a cluster: arrays arrive as they are, and only those who know the key are heard."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tilewright.runtime.cluster.channel import Channel, accepted, connected

KEY = bytes(range(32))


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)  # no test waits for ever for a connection that does not come
        yield listener


@pytest.fixture
def ends(listener: socket.socket) -> Iterator[tuple[Channel, Channel]]:
    """Both ends of a connection."""
    with ThreadPoolExecutor() as pool:
        there = pool.submit(accepted, listener, KEY)
        here = connected(listener.getsockname(), KEY)
        yield here, there.result()
        here.close()
        there.result().close()


def test_arrays_arrive_as_they_are_and_may_be_written(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    sent = {
        "large": np.random.default_rng(0).random((3, 700, 900), np.float32),
        "empty": np.zeros((0, 4), np.int64),
        "number": np.array([1.5], np.float16),
        "crop": np.arange(48).reshape(6, 8)[1:5, 2:6],
        "text": "x",
    }
    sent["large"].flags.writeable = False
    with ThreadPoolExecutor() as pool:
        sending = pool.submit(here.send, sent)
        came = there.receive()
        sending.result()
    assert list(came) == list(sent) and came["text"] == "x"
    for name in ("large", "empty", "number", "crop"):
        np.testing.assert_array_equal(came[name], sent[name])
        assert came[name].dtype == sent[name].dtype
    came["number"][:] = 2
    there.send(came["number"])
    assert here.receive() == [2]


def test_nothing_is_read_of_a_connection_that_does_not_know_the_key(listener: socket.socket) -> None:
    with ThreadPoolExecutor() as pool:
        there = pool.submit(accepted, listener, KEY)
        for wrong in (bytes(32), KEY[:-1], b""):
            with socket.create_connection(listener.getsockname()) as stranger:
                stranger.sendall(wrong)
                stranger.shutdown(socket.SHUT_WR)
                assert stranger.recv(1) == b""  # closed
        here = connected(listener.getsockname(), KEY)
        here.send("hello")
        assert there.result().receive() == "hello"
        here.close()
        there.result().close()


def test_an_end_that_goes_is_noticed(ends: tuple[Channel, Channel]) -> None:
    here, there = ends
    there.close()
    with pytest.raises((EOFError, OSError)):
        here.receive()
