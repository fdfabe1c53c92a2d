"""What a batch is worth: the loss that training lowers and the counts that an evaluation adds up.

The trainer and the evaluation step any object with this shape; only this file knows what "top-1" is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:  # the engine takes any object with these fields, and installs without the loaders
    from data import Batch


class Task(Protocol):
    """How to score a model. All sums run over the valid rows of a batch, so adding them up is exact."""

    names: tuple[str, ...]  # of the metrics
    headline: str  # the one that chooses the best checkpoint; the larger the better

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The summed loss of a batch, to differentiate."""
        ...

    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        """Sums over a batch as float64 (M,), the number of samples first."""
        ...

    def metrics(self, counts: Tensor) -> dict[str, float]:
        """What the added-up counts of a whole data set mean."""
        ...


class Classification:
    """Cross-entropy with label smoothing (Szegedy et al., 2016); top-1 and top-5 accuracy in percent."""

    names: tuple[str, ...] = ("loss", "top1", "top5")
    headline = "top1"

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.images)[: batch.valid]
        targets = batch.targets[: batch.valid]
        return cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=self.label_smoothing)

    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.images)[: batch.valid].float()
        targets = batch.targets[: batch.valid]
        ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]
        sums = (cross_entropy(logits, targets, reduction="sum"), ranked[:, :1].sum(), ranked.sum())
        return torch.stack([logits.new_tensor(batch.valid), *sums]).double()

    def metrics(self, counts: Tensor) -> dict[str, float]:
        n, loss, top1, top5 = counts.tolist()
        return {"loss": loss / n, "top1": 100 * top1 / n, "top5": 100 * top5 / n}
