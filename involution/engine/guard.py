"""Numbers that go wrong: found on the device, skipped on all ranks alike, counted, and in the end reported."""

import logging
from collections import deque

import torch
from torch import Tensor, nn

from involution.engine.distributed import World
from involution.engine.errors import Stopped

log = logging.getLogger("involution")


class Guard:
    """Counts non-finite steps in a row and keeps them out of the BatchNorm statistics.

    `record` costs no synchronisation; `check` reads the counters, so it is called once in a while, and changes nothing.
    """

    def __init__(self, model: nn.Module, max_in_row: int, world: World) -> None:
        self.max_in_row, self.is_main = max_in_row, world.is_main
        self.in_row = torch.zeros((), device=world.device)  # bad steps up to now, without a good one between
        self.longest = torch.zeros((), device=world.device)  # the most that there were in a row since the start
        self.total = torch.zeros((), device=world.device)
        self._reported = 0.0
        self._losses: deque[Tensor] = deque(maxlen=20)
        self._buffers = [b for b in model.buffers() if b.dtype == torch.float32]
        self._keep()

    def _keep(self) -> None:
        """Remember the statistics: in one tensor, so that a step costs three kernels and not three a layer."""
        if self._buffers:
            self._kept = torch.cat([buffer.flatten() for buffer in self._buffers])
            parts = self._kept.split([buffer.numel() for buffer in self._buffers])
            self._views = [part.view_as(buffer) for part, buffer in zip(parts, self._buffers, strict=True)]

    def record(self, bad: Tensor, loss: Tensor) -> None:
        """Note a step's outcome (scalars on the device): whether it was skipped, and its mean loss.

        The forward pass of a skipped step went through BatchNorm: its statistics return to what they were before.
        """
        self.in_row = (self.in_row + 1) * bad
        self.longest = torch.maximum(self.longest, self.in_row)
        self.total += bad
        self._losses.append(loss)
        if self._buffers:
            now = torch.cat([buffer.flatten() for buffer in self._buffers])
            torch.where(bad | ~torch.isfinite(now), self._kept, now, out=self._kept)
            torch._foreach_copy_(self._buffers, self._views)

    def recent_loss(self) -> float:
        """The mean loss of the last (at most 20) steps on this rank, without the skipped ones."""
        losses = torch.stack(list(self._losses)) if self._losses else torch.zeros(0)
        return losses[losses.isfinite()].mean().item()

    def check(self, step: int, lr: float) -> None:
        """Report skipped steps.

        Raises:
            Stopped: after `max_in_row` skipped steps in a row.
        """
        total, longest = torch.stack([self.total, self.longest]).tolist()
        if total > self._reported and self.is_main:
            log.warning("%d step(s) up to step %d were skipped: loss or gradient not finite", total, step)
        self._reported = total
        if longest >= self.max_in_row:
            losses = ", ".join(f"{loss:.4g}" for loss in torch.stack(list(self._losses)).tolist())
            raise Stopped(
                f"{longest:.0f} steps in a row had a loss or gradient that is not finite: stopped at step {step}, "
                f"lr {lr:.4g}; recent losses: {losses}. The last good checkpoint is intact. A lower optimizer.lr, a "
                "longer schedule.warmup_epochs, train.clip_grad_norm or bf16 in place of fp16 usually helps"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {"in_row": self.in_row, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on counting; the model must have been loaded before."""
        self.in_row.copy_(state["in_row"])
        self.longest.copy_(self.in_row)
        self.total.copy_(state["total"])
        self._reported = self.total.item()
        self._keep()
