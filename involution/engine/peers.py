"""Ranks look after each other, so that none of them waits forever for one that will not come.

Beside the collectives, which can only wait, every rank talks to the store of the rendezvous from a thread: it tells
that it is alive and how far it has come, and it learns of a rank that failed (and leaves with that rank's exit status)
or that has been missing for longer than the time-out (and leaves after naming it).
"""

import json
import logging
import os
import socket
import threading
import time
from typing import Any, NamedTuple

from involution.checks import first_line

log = logging.getLogger("involution")
INTERVAL = 1.0  # seconds between two looks at the store
FAILURE = "failure"  # key: the first rank that fails writes what happened there


class Report(NamedTuple):
    """What a rank tells: heartbeats, progress, seconds without any, and its machine."""

    beats: int
    progress: int
    still: float
    host: str


class Peers:
    """A thread that ends this process when another rank's end or absence makes its work pointless.

    Args:
        store: this thread's own connection, with keys of this attempt only (torchrun may start the ranks again).
        timeout: seconds without progress after which ranks that are behind count as missing.
    """

    def __init__(self, rank: int, size: int, store: Any, timeout: float) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.progress = 0  # collectives and batches up to now: nearly the same number on every rank
        self._store = store
        self._beats, self._seen, self._since = 0, -1, time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching: from here on each rank may leave when it likes.

        Waits for the thread: Python aborts when it ends while a thread is inside the store's C++ code.
        """
        self._done.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(30)

    def announce(self, status: int, message: str) -> tuple[int, int, str]:
        """Tell the others that this rank ends with `status`; returns the first rank that did, its status and words."""
        self.stop()
        mine = json.dumps([self.rank, status, message])
        try:
            first = self._store.compare_set(FAILURE, "", mine).decode()
        except Exception:  # the store went away with another rank
            first = mine
        rank, status, message = json.loads(first)
        return rank, status, message

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            try:
                still = self._beat()
                if self._store.check([FAILURE]):
                    self._follow(*json.loads(self._store.get(FAILURE)))
                if still > self.timeout:
                    self._name_missing()
            except Exception as error:
                # rank 0 (or torchrun), which keeps the store, is gone; at the end of a program that is no failure
                if self._done.wait(5):
                    return
                self._leave(1, f"lost the connection to rank 0: {first_line(error)}")

    def _beat(self) -> float:
        """Tell that this rank lives, and how far it is; the seconds since it got that far."""
        self._beats += 1
        if self.progress != self._seen:
            self._seen, self._since = self.progress, time.monotonic()
        still = time.monotonic() - self._since
        report = Report(self._beats, self.progress, still, socket.gethostname())
        self._store.set(f"rank {self.rank}", json.dumps(report))
        return still

    def _reports(self) -> dict[int, Report]:
        """Of the ranks that ever reported."""
        keys = {rank: f"rank {rank}" for rank in range(self.size)}
        known = [rank for rank, key in keys.items() if self._store.check([key])]
        values = self._store.multi_get([keys[rank] for rank in known])
        return {rank: Report(*json.loads(value)) for rank, value in zip(known, values, strict=True)}

    def _name_missing(self) -> None:
        """Leave if a rank does not live, or has stood still as long as this one and not come as far as others."""
        before = self._reports()
        for _ in range(3):
            if self._done.wait(INTERVAL):
                return
            self._beat()  # for others may be looking too
        now, furthest = self._reports(), max(report.progress for report in before.values())
        missing = []
        for rank in range(self.size):
            if rank not in now:
                missing.append(f"rank {rank} never reported")
            elif rank != self.rank and rank in before and now[rank].beats == before[rank].beats:
                missing.append(f"rank {rank} on {now[rank].host} no longer reports (dead or frozen)")
            elif now[rank].progress < furthest and now[rank].still > self.timeout:
                missing.append(f"rank {rank} on {now[rank].host} is busy with something else")
        if missing:
            message = f"no progress for {self.timeout:.0f} s (train.timeout_minutes): {'; '.join(missing)}"
            self._follow(*self.announce(1, message))

    def _follow(self, rank: int, status: int, message: str) -> None:
        words = message.strip().splitlines()[-1] if message.strip() else f"exit status {status}"
        self._leave(status, words if rank == self.rank else f"leaving because rank {rank} did: {words}")

    def _leave(self, status: int, message: str) -> None:
        log.error("[rank %d] %s", self.rank, message)
        logging.shutdown()
        os._exit(status)
