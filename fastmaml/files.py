"""Files that survive a crash: atomic writes, and the folder for what is computed once."""

from __future__ import annotations

import os
import secrets
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


def write_atomically(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Replace `path` by what `write(file)` produces, or leave it exactly as it was.

    The bytes go to a temporary file in the same folder, reach the disk, and only then take the
    name. A crash at any moment leaves either the old file or the new one. A link stays, and leads
    to the new one.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # which has the permissions of any new file
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # of a full disk, say, it has none
        raise
    _sync_directory(path.parent)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Raise an OSError now where :func:`write_atomically` would fail later for want of a place."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}; name another file") from error


def cache_directory() -> Path | None:
    """The user's cache folder for fastmaml; `FASTMAML_CACHE` names another one.

    None where there is neither that, nor a home: for a user without an entry in the system's list.
    """
    if chosen := os.environ.get("FASTMAML_CACHE"):
        return Path(chosen).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "fastmaml"
    with suppress(RuntimeError):
        return Path.home() / ".cache" / "fastmaml"
    return None


def _sync_directory(folder: Path) -> None:
    """Make the new name itself durable."""
    handle = os.open(folder, os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
