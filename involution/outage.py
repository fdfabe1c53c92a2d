"""Errors of the operating system that say nothing about a file: its disk, a network or a limit failed for a while."""

import errno
import fcntl
import time
from collections.abc import Callable
from typing import IO, TypeVar

#: of disks and network file systems, and of a process that has too many files open or too little memory
OUTAGES = frozenset(
    getattr(errno, name)
    for name in (
        "EIO", "ESTALE", "ETIMEDOUT", "ENOTCONN", "ECONNRESET", "ECONNREFUSED", "EHOSTDOWN", "EHOSTUNREACH",
        "ENETDOWN", "ENETUNREACH", "EREMOTEIO", "EMFILE", "ENFILE", "ENOMEM",
    )
    if hasattr(errno, name)
)  # fmt: skip
#: what locking says on Lustre without -o flock, NFS without lockd, some of FUSE
NO_LOCKS = frozenset({errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP})
PAUSES = (0.2, 1.0, 4.0)  # seconds between tries
Read = TypeVar("Read")


def is_outage(error: BaseException) -> bool:
    """Whether an error is one of these."""
    return isinstance(error, OSError) and error.errno in OUTAGES


def patiently(read: Callable[[], Read]) -> Read:
    """What `read` returns, which is called again after a while where it meets an outage."""
    for pause in PAUSES:
        try:
            return read()
        except OSError as error:
            if not is_outage(error):
                raise
        time.sleep(pause)
    return read()


def wait_for_lock(file: IO[str]) -> None:
    """Take a file's lock, as soon as nobody else has it. Where the file system has none, nothing is locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
