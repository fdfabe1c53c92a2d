"""The ways a program ends (exit statuses: 0 done, 1 unexpected error, 2 wrong input, 75 stopped early, state saved)."""

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: run again to continue


class UserError(ValueError):
    """Wrong configuration or input: its message is all that the user gets to see, so it says what to do."""


class Preempted(BaseException):
    """A signal stopped training and the state is saved. Not an Exception: it also ends the sweep around the run.

    Args:
        requeue: the signal was submitit's, which puts the job back into the queue.
    """

    def __init__(self, message: str, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue


class Stopped(RuntimeError):
    """The run cannot go on (it diverged, the disk is full) though nobody mistook anything: one message, exit 1."""
