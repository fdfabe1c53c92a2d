"""What an error makes of a program's end: its exit status, and what it says."""

import errno

import pytest
import torch

from data import BadImageError
from involution.checks import SizeError
from involution.engine.cli import _outcome
from involution.engine.errors import UserError


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("no such thing"), 2, "no such thing"),
        (BadImageError("a.jpg", "it is empty"), 2, "cannot read image 'a.jpg': it is empty"),
        (SizeError("too small"), 2, "too small"),
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried"),
            2,
            "CUDA out of memory. Take a smaller train.batch_size",
        ),
        (MemoryError("there is no memory left"), 2, "in eval.py a smaller batch_size"),
        (MemoryError(), 2, "MemoryError. Take a smaller train.batch_size"),
        (OSError(errno.ENOSPC, "No space left on device", "a.pt"), 1, "make room and run again"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1, "make room and run again"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/a"), 2, "runs/a: Permission denied"),
        (ZeroDivisionError("ours"), 1, "ZeroDivisionError: ours"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_status_and_message(error: Exception, status: int, said: str) -> None:
    found, message = _outcome(error)
    assert found == status
    assert said in message


def test_memory_that_torch_cannot_have_on_the_cpu() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(10**15)
    status, message = _outcome(error.value)
    assert status == 2
    assert "can't allocate memory" in message
    assert "Take a smaller train.batch_size" in message
