"""What it takes that files survive a kill, a power failure and a full disk.

L0; needs nothing but the standard library.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from megatron_drpo.errors import DrpoError

_USERS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})


def write_atomically(path: Path, text: str) -> None:
    """Replace the file at once: a reader, or a run killed here, sees the old text or the new."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync_path(path: Path) -> None:
    """Force a file to the disk; or a directory's names, without which a new file may be lost."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def users_errors(what: str, after: str) -> Iterator[None]:
    """Turn a full or read-only disk into an error that the user can mend.

    Args:
        what: the flag and its value.
        after: what to do once the disk is mended.

    Raises:
        DrpoError: instead of such an OSError; any other one passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _USERS:
            raise
        raise DrpoError(f"{what}: {error.strerror}; free or mend the disk, then {after}") from error
