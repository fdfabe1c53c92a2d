"""Preemption: SIGTERM, SIGINT and SIGUSR1 ask the run to save its state and leave."""

import logging
import signal
from types import FrameType
from typing import Any

log = logging.getLogger("involution")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """A context in which these signals set `received` (the first one's name) instead of ending the process.

    A second SIGINT (Ctrl-C twice) stops at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            log.warning("%s received: finishing the step, then saving", self.received)
