"""An epoch's sums, as state: they survive a restart in the middle of it."""

import resource
import time
from typing import Any

import torch
from torch import Tensor

from involution.engine.distributed import sum_over_ranks


class Meter:
    """Adds up loss and samples on the device and the time on the host; never an average of averages."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, samples: without skipped steps
        self.samples = 0.0  # of all steps, this rank's share
        self.seconds, self.waiting = 0.0, 0.0
        self.restart_interval()
        self.resume()

    def resume(self) -> None:
        """Start the clock (evaluations and checkpoints at an epoch's end are not training time)."""
        self._clock = time.monotonic()

    def pause(self) -> None:
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now

    def add(self, loss: Tensor, samples: float, bad: Tensor) -> None:
        """Add a step: the summed loss and the number of samples of this rank."""
        self.samples += samples
        self.sums += torch.stack([loss.double(), loss.new_tensor(samples).double()]).where(~bad, 0)

    def epoch(self) -> dict[str, float | None]:
        """What this epoch's sums over all ranks mean; the clock must be paused."""
        loss, good = sum_over_ranks(self.sums.clone()).tolist()
        samples = sum_over_ranks(self.sums.new_tensor(self.samples)).item()
        return {
            "train_loss": loss / good if good else None,
            "images_per_s": samples / self.seconds,
            "data_wait": self.waiting / self.seconds,
            "seconds": self.seconds,
            "peak_memory_mb": peak_memory_mb(self.sums.device),
        }

    def restart_interval(self) -> None:
        self._mark = (time.monotonic(), self.samples, self.waiting)

    def interval(self, ranks: int) -> dict[str, float]:
        """Speed since the last call, of all ranks as far as this one can tell."""
        begin, samples, waiting = self._mark
        seconds = time.monotonic() - begin
        speed = {
            "images_per_s": ranks * (self.samples - samples) / seconds,
            "data_wait": (self.waiting - waiting) / seconds,
        }
        self.restart_interval()
        return speed

    def start_epoch(self) -> None:
        self.sums.zero_()
        self.samples, self.seconds, self.waiting = 0.0, 0.0, 0.0
        self.restart_interval()
        self.resume()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "samples": self.samples, "seconds": self.seconds, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.samples, self.seconds, self.waiting = state["samples"], state["seconds"], state["waiting"]
        self.restart_interval()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory ever in use: on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
