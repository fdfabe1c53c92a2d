"""The folder that keeps what is expensive to make again: the built operator, downloads, the demo data, listings."""

import atexit
import functools
import logging
import os
import shutil
import tempfile
from pathlib import Path

log = logging.getLogger("involution")


def cache_dir() -> Path:
    """$INVOLUTION_CACHE, else $XDG_CACHE_HOME/involution, else ~/.cache/involution; it may be missing or read-only.

    Where there is no home folder, ``writable_cache_dir``.
    """
    if chosen := os.environ.get("INVOLUTION_CACHE"):
        return Path(os.path.abspath(chosen))
    if (base := os.environ.get("XDG_CACHE_HOME", "")) and os.path.isabs(base):
        return Path(base) / "involution"
    try:
        return Path.home() / ".cache" / "involution"
    except RuntimeError as error:  # no HOME, and no account for this uid
        return _temporary(str(error))


def writable_cache_dir() -> Path:
    """``cache_dir()``, or where it cannot be written a temporary folder until this process ends (logged once)."""
    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
        reason = f"{folder} is not writable"
    except OSError as error:
        reason = f"{folder}: {error.strerror}"
    return _temporary(reason)


@functools.cache
def _made(process: int) -> Path:
    """A folder of one process: nobody else can have written to it."""
    folder = tempfile.mkdtemp(prefix="involution-")
    atexit.register(_remove, folder, process)
    return Path(folder)


def _temporary(reason: str) -> Path:
    first = not _made.cache_info().currsize
    folder = _made(os.getpid())
    if first:
        log.warning(
            "no cache folder (%s), so everything is made and downloaded again every time; set INVOLUTION_CACHE to a "
            "folder that can be written. Until this process ends %s serves",
            reason, folder,
        )  # fmt: skip
    return folder


def _remove(folder: str, process: int) -> None:
    if os.getpid() == process:  # not in its forked children
        shutil.rmtree(folder, ignore_errors=True)
