"""One writer a folder at a time: locks that end with their process, however it ends."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks, and nothing is refused there
    fcntl = None  # type: ignore[assignment]


@contextlib.contextmanager
def sole_writer(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing.

    Args:
      folder: what to lock; the lock is on the folder itself, so that nothing is left behind.
      name: what messages call it.

    Raises:
      BlockingIOError: somebody else holds it, or held it a moment ago and moved the folder away.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, sole_writer(Path(folder), "out"):
    ...     with sole_writer(Path(folder), "out"):
    ...         pass
    Traceback (most recent call last):
    BlockingIOError: [Errno 11] out is being written by another ...
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = None if fcntl is None else os.open(folder, os.O_RDONLY)
    except (FileExistsError, FileNotFoundError):
        if folder.exists() and not folder.is_dir():
            raise
        raise _taken(name) from None  # made, and moved away at once, by somebody else
    if handle is None:
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            moved = not folder.exists() or not os.path.samestat(os.stat(folder), os.fstat(handle))
        except (BlockingIOError, FileNotFoundError):
            moved = True
        if moved:
            raise _taken(name)
        yield
    finally:
        os.close(handle)


def _taken(name: str) -> BlockingIOError:
    return BlockingIOError(
        errno.EAGAIN,
        f"{name} is being written by another process or thread; wait until it is done, or choose "
        "another folder",
    )
