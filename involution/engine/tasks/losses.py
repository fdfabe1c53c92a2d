"""Losses of classification, for classes and for mixtures of two; summed over a batch's images that count.

Shapes: b images, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from data import Batch


def soft_targets(batch: Batch, classes: int, smoothing: float) -> Tensor:
    """Probabilities (b, K): label smoothing (Szegedy et al., 2016) of both pictures' classes, by their shares."""
    every = torch.arange(classes, device=batch.targets.device)

    def smooth(targets: Tensor) -> Tensor:  # no F.one_hot: it would wait for the device to check its input
        return (targets[:, None] == every).float() * (1 - smoothing) + smoothing / classes

    own = smooth(batch.targets[: batch.valid])
    return own if batch.partners is None else torch.lerp(smooth(batch.partners), own, batch.share)


@dataclass(frozen=True)
class CrossEntropy:
    smoothing: float = 0.0

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        if batch.partners is not None:
            return F.cross_entropy(logits, soft_targets(batch, logits.shape[1], self.smoothing), reduction="sum")
        targets = batch.targets[: batch.valid]
        return F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.smoothing)


@dataclass(frozen=True)
class BinaryCrossEntropy:
    """Every class a question of its own, a mean over the classes (Wightman et al., 2021; timm's BinaryCrossEntropy).

    Args:
        threshold: targets above it become 1, others 0; None: they stay.
    """

    smoothing: float = 0.0
    threshold: float | None = None

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        targets = soft_targets(batch, logits.shape[1], self.smoothing)
        if self.threshold is not None:
            targets = (targets > self.threshold).float()
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]
