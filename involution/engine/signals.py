"""Preemption: SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 ask the run to save its state and leave.

SIGUSR2 is submitit's, at the end of a job's time: submitit then puts the job back into the queue, but not before the
state is saved.
"""

import logging
import signal
from types import FrameType
from typing import Any, NoReturn

from involution.engine.errors import EXIT_PREEMPTED, Preempted

log = logging.getLogger("involution")
REQUEUE = signal.SIGUSR2
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, REQUEUE)
_submitit: Any = None  # its reaction to REQUEUE, where it started this process


class StopRequest:
    """A context in which these signals set `received` (the first one's name) instead of ending the process.

    A second SIGINT (Ctrl-C twice) stops at once.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._interrupts = 0
        self._before: dict[int, Any] = {}

    @property
    def requeue(self) -> bool:
        return self.received == REQUEUE.name

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            # a launcher that sees one rank leave signals the others, which are about to leave with their own status
            signal.signal(number, signal.SIG_IGN if kind is Preempted else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if self.received is None:
            self.received = signal.Signals(number).name
            log.warning("%s received: finishing the step, then saving", self.received)


def leave_on_signals() -> None:
    """Until training begins there is nothing to save: leave at once, with the status that says "run again"."""
    global _submitit
    if callable(handler := signal.getsignal(REQUEUE)) and handler is not _leave:
        _submitit = handler
    for number in SIGNALS:
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    message = f"{signal.Signals(number).name} received before the first step: run the same command again"
    raise Preempted(message, requeue=number == REQUEUE)


def requeue() -> int:
    """Now that the state is saved, let submitit put the job back into the queue; returns the exit status for that."""
    try:
        if _submitit is not None:
            _submitit(REQUEUE, None)
    except SystemExit as leave:
        return int(leave.code or 0)
    except Exception as error:  # too many time-outs, or SLURM does not answer
        log.error("the job does not go back into the queue: %s", error)
    return EXIT_PREEMPTED
