"""Files that a crash leaves whole: written under another name, synced, then renamed."""

from __future__ import annotations

import errno
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

#: What a file is called until it is whole; a kill may leave one behind, and nothing ever reads it.
UNFINISHED = ".unfinished-"


class StorageError(OSError):
    """A file could not be written, as on a full disk; what it would have replaced is still there."""


@contextmanager
def storage_errors(what: Path) -> Iterator[None]:
    """Within, a failing write becomes a `StorageError` that names the file ``what``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {what}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of ``path`` once it is whole and on the disk, or never.

    Raises:
        StorageError: It cannot be written; ``path`` is as it was.
    """
    unfinished = path.with_name(UNFINISHED + path.name)
    with storage_errors(path):
        try:
            with unfinished.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # a rename may reach the disk before the data would
            os.replace(unfinished, path)
        except BaseException:
            with suppress(OSError):
                unfinished.unlink()
            raise
        sync_folder(path.parent)


def damage(path: Path) -> str | None:
    """What is wrong with a file of torch.save, by the checksums at which torch.load does not look; None: nothing.

    Raises:
        OSError: It cannot be read now, which says nothing about it.
    """
    try:
        with zipfile.ZipFile(path) as records:
            bad = records.testzip()
    except Exception as error:  # one flipped bit turns plain records into compressed ones: zlib.error, and others
        # EINVAL: a record that would begin before the file does.
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno != errno.EINVAL):
            raise
        return f"not a whole file ({error})"
    return None if bad is None else f"the checksum of {bad} is wrong"


def sync_folder(folder: Path) -> None:
    """Wait until the names in ``folder`` are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make ``folder`` with its parents, on the disk, and remove what a killed run has left unfinished in it."""
    with storage_errors(folder):
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in missing:
            sync_folder(path.parent)
        for unfinished in folder.glob(UNFINISHED + "*"):
            unfinished.unlink()
