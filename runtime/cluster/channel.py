"""A connection to one worker, over which arrays go as they are. Ray's object store would copy them several times."""

import hmac
import pickle
import socket
import struct
from typing import Any

import numpy as np

__all__ = ["Channel", "accepted", "connected"]

CONNECTS_S = 5.0  # a machine that can be reached accepts a connection within so many seconds
SILENT_S, ASKS_S, TRIES = 15, 5, 3  # a machine that does not even answer the network after so long is lost
ENDED = "the connection has ended"
COUNT = struct.Struct("<Q")


class Channel:
    """One end of a connection. One thread at a time sends and receives."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (("TCP_KEEPIDLE", SILENT_S), ("TCP_KEEPINTVL", ASKS_S), ("TCP_KEEPCNT", TRIES)):
            if hasattr(socket, name):  # not on every system
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, value: Any) -> None:
        """Send a value; its arrays are not copied."""
        if self.connection.fileno() < 0:
            raise EOFError(ENDED)
        buffers: list[pickle.PickleBuffer] = []
        head = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        arrays = [buffer.raw() for buffer in buffers]
        sizes = struct.pack(f"<{2 + len(arrays)}Q", len(arrays), len(head), *(array.nbytes for array in arrays))
        self.connection.sendall(sizes + head)
        for array in arrays:
            self.connection.sendall(array)

    def receive(self) -> Any:
        """The next value. The arrays in it may be written. EOFError if the other end has gone."""
        (count,) = COUNT.unpack(self._read(COUNT.size))
        sizes = struct.unpack(f"<{1 + count}Q", self._read((1 + count) * COUNT.size))
        head, *arrays = [self._read(size) for size in sizes]
        return pickle.loads(head, buffers=arrays)

    def _read(self, size: int) -> memoryview:
        read = np.empty(size, np.uint8).data
        rest = read
        while rest:
            count = self.connection.recv_into(rest)
            if not count:
                raise EOFError(ENDED)
            rest = rest[count:]
        return read

    def ended(self) -> bool:
        """Whether the other end has gone. Any thread may ask."""
        try:
            return self.connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True

    def close(self) -> None:
        """End the connection; the other end notices it."""
        self.connection.close()


def accepted(listener: socket.socket, key: bytes) -> Channel:
    """The first connection that begins with the key. Nothing of another is looked at."""
    while True:
        connection, _ = listener.accept()
        connection.settimeout(CONNECTS_S)
        try:
            if hmac.compare_digest(connection.recv(len(key), socket.MSG_WAITALL), key):
                return Channel(connection)
        except OSError:
            pass
        connection.close()


def connected(address: tuple[str, int], key: bytes) -> Channel:
    """A connection to the worker that accepts this key."""
    connection = socket.create_connection(address, CONNECTS_S)
    connection.sendall(key)
    return Channel(connection)
