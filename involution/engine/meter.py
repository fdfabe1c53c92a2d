"""An epoch's sums, as state: they survive a restart in the middle of it, on any number of ranks."""

import re
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from involution.engine.distributed import World, gather_objects, sum_over_ranks


class Meter:
    """Adds up loss and samples on the device and the time on the host; never an average of averages."""

    def __init__(self, world: World, parts: Sequence[str] = ()) -> None:
        self.world, self.parts = world, parts
        # of this rank: loss and samples without the skipped steps, skipped steps, samples of all steps, the parts
        self.sums = torch.zeros(4 + len(parts), dtype=torch.float64, device=world.device)
        self.seconds, self.waiting = 0.0, 0.0
        self._clock: float | None = None
        self._seen = 0.0  # samples since the last call of `interval`
        self._mark = (time.monotonic(), 0.0)

    def resume(self) -> None:
        """Start the clock (evaluations are not training time)."""
        self._clock = time.monotonic()

    def pause(self) -> None:
        """Stop the clock, if it runs."""
        if self._clock is not None:
            self.seconds += time.monotonic() - self._clock
        self._clock = None

    def add(self, losses: Tensor, samples: float, bad: Tensor) -> None:
        """Add a step of this rank: its summed loss and parts (1 + P,), number of samples, whether it was skipped."""
        losses = losses.double()
        n = losses.new_full((), samples)  # filled on the device: a copy from the host would wait for it
        self.sums[:2] += torch.stack([losses[0], n]).where(~bad, 0)
        self.sums[2:4] += torch.stack([bad, n])
        if self.parts:
            self.sums[4:] += losses[1:].where(~bad, 0)
        self._seen += samples

    def epoch(self) -> dict[str, float | None]:
        """What this epoch's sums over all ranks mean; the clock must be paused."""
        loss, good, skipped, samples, *parts = sum_over_ranks(self.sums.clone()).tolist()
        means = [loss / good if good else None for loss in (loss, *parts)]
        return {
            **{f"train_{name}": mean for name, mean in zip(("loss", *self.parts), means, strict=True)},
            "skipped_steps": round(skipped / self.world.size),
            "images_per_s": samples / self.seconds,
            "data_wait": self.waiting / self.seconds,
            "seconds": self.seconds,
            "peak_memory_mb": peak_memory_mb(self.world.device),
        }

    def interval(self) -> dict[str, float]:
        """Speed since the last call, of all ranks as far as this one can tell."""
        begin, waiting = self._mark
        seconds = time.monotonic() - begin
        speed = {
            "images_per_s": self.world.size * self._seen / seconds,
            "data_wait": (self.waiting - waiting) / seconds,
        }
        self.restart_interval()
        return speed

    def restart_interval(self) -> None:
        self._mark, self._seen = (time.monotonic(), self.waiting), 0.0

    def start_epoch(self) -> None:
        self.sums.zero_()
        self.seconds, self.waiting = 0.0, 0.0
        self.restart_interval()

    def state_dict(self) -> dict[str, Any]:
        """Every rank's sums, and the time on this one's clock. A collective call."""
        running = 0.0 if self._clock is None else time.monotonic() - self._clock
        seconds = self.seconds + running
        return {"sums": gather_objects(self.sums.tolist()), "seconds": seconds, "waiting": self.waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the sums of the rank of this number; where ranks became fewer, those left share all of them."""
        self.sums.zero_()
        for rank, sums in enumerate(state["sums"]):
            if rank % self.world.size == self.world.rank:
                self.sums += self.sums.new_tensor(sums)
        self.seconds, self.waiting = state["seconds"], state["waiting"]
        self.restart_interval()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory ever in use: on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def forget_peak_memory(device: torch.device) -> None:
    """Let the next run of this process, a sweep's next job, have a maximum of its own."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):  # Linux alone can
            Path("/proc/self/clear_refs").write_text("5")
