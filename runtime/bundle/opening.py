"""Opening files. A pipe, a socket or a device is refused: to open or to read it may never end."""

import errno
import os
import stat

__all__ = ["not_a_file", "only_files"]


def only_files(path: str, flags: int) -> int:
    """Open a regular file; use it as `open(path, opener=only_files)`. The flag keeps a pipe from waiting."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return descriptor
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise not_a_file(path)


def not_a_file(path: str) -> OSError:
    """The error of a path with a pipe, a socket or a device."""
    return OSError(errno.EINVAL, "is a device or a pipe, not a file", path)
