"""Numbers that go wrong: found on the device, skipped on all ranks alike, counted, and in the end reported."""

import logging
from collections import deque

import torch
from torch import Tensor, nn

from involution.engine.errors import Stopped

log = logging.getLogger("involution")


class Guard:
    """Counts non-finite steps in a row and keeps them out of the BatchNorm statistics.

    `record` costs no synchronisation. `check` reads the counter, so it is called once in a while. A skipped step leaves
    the weights alone but has gone through BatchNorm in the forward; training never reads those statistics, so it is
    enough to put back the last good ones before somebody does.
    """

    def __init__(self, modules: list[nn.Module], max_in_row: int, device: torch.device) -> None:
        self.max_in_row = max_in_row
        self.in_row = torch.zeros((), device=device)  # bad steps up to now, without a good one between
        self.total = torch.zeros((), device=device)
        self._losses: deque[Tensor] = deque(maxlen=20)
        self._buffers = [b for module in modules for b in module.buffers() if b.is_floating_point()]
        self._seen = 0.0
        self._keep()

    def _keep(self) -> None:
        self._kept = [buffer.clone() for buffer in self._buffers]

    def record(self, bad: Tensor, loss: Tensor) -> None:
        """Note a step's outcome (scalars on the device): whether it was skipped, and its mean loss."""
        self.in_row = (self.in_row + 1) * bad
        self.total += bad
        self._losses.append(loss)

    def recent_loss(self) -> float:
        """The mean loss of the last (at most 20) steps on this rank, without the skipped ones."""
        return torch.stack(list(self._losses)).nanmean().item() if self._losses else float("nan")

    def check(self, step: int, lr: float) -> None:
        """Heal the statistics after skipped steps.

        Raises:
            Stopped: after `max_in_row` skipped steps in a row.
        """
        total, in_row = torch.stack([self.total, self.in_row]).tolist()
        if total == self._seen:
            return self._keep()
        log.warning("%d non-finite step(s) skipped up to step %d", total, step)
        self._seen = total
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            if not torch.isfinite(buffer).all():
                buffer.copy_(kept)
        if in_row >= self.max_in_row:
            losses = ", ".join(f"{loss:.4g}" for loss in torch.stack(list(self._losses)).tolist())
            raise Stopped(
                f"the last {in_row:.0f} steps had a loss or gradient that is not finite: stopped at step {step}, "
                f"lr {lr:.4g}; recent losses: {losses}. The last good checkpoint is intact. A lower optimizer.lr, a "
                "longer schedule.warmup_epochs, train.clip_grad_norm or bf16 in place of fp16 usually helps"
            )

    def state_dict(self) -> dict[str, Tensor]:
        return {"in_row": self.in_row, "total": self.total}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.in_row.copy_(state["in_row"])
        self.total.copy_(state["total"])
        self._seen = self.total.item()
        self._keep()
