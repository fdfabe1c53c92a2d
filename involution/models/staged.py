"""What all networks here have in common: a stem, four stages, global pooling and a linear classifier.

Resolution of an H x W image:  stem H/2 -> max pool H/4 -> layer1 H/4 -> layer2 H/8 -> layer3 H/16 -> layer4 H/32
"""

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import NotScripted, check_share, unknown_name

if TYPE_CHECKING:
    from typing_extensions import Self

PARTS = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")


class AverageAndMax(nn.Module):
    """The mean of the average and the maximum over all pixels: (B, C, H, W) -> (B, C, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (F.adaptive_avg_pool2d(x, 1) + F.adaptive_max_pool2d(x, 1))


def pooling(kind: str) -> nn.Module:
    """Global pooling by its name: (B, C, H, W) -> (B, C); none for ""."""
    if not kind:
        return nn.Identity()
    pools = {"avg": lambda: nn.AdaptiveAvgPool2d(1), "max": lambda: nn.AdaptiveMaxPool2d(1), "avgmax": AverageAndMax}
    return nn.Sequential(pools[kind](), nn.Flatten())


class StagedNetwork(NotScripted, nn.Module):
    """Base of the networks: a subclass makes the parts below and ends with ``add_classifier``.

    ``feature_info`` lists the five levels of a feature pyramid: module name, channels and stride.
    """

    stem: nn.Module
    maxpool: nn.Module
    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential
    layer4: nn.Sequential
    feature_info: list[dict[str, Any]]
    num_features: int
    num_classes: int
    drop_rate: float = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.frozen: tuple[str, ...] = ()

    def add_classifier(self, num_classes: int, global_pool: str = "avg", drop_rate: float = 0.0) -> None:
        """The end of every constructor: global pooling, dropout of its features, and the classifier."""
        check_share(drop_rate=drop_rate)
        self.drop_rate = drop_rate
        self.reset_classifier(num_classes, global_pool)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a fresh one for ``num_classes``; 0 removes it.

        ``global_pool`` is avg, max, avgmax (their mean), or "" for unpooled features, which have no classifier.
        """
        if not isinstance(num_classes, Integral) or num_classes < 0:
            raise ValueError(f"num_classes is {num_classes!r}; it should be an integer of at least 0")
        if global_pool is not None:
            if global_pool not in ("avg", "max", "avgmax", ""):
                raise ValueError(f'global_pool is {global_pool!r}; it should be "avg", "max", "avgmax" or ""')
            if num_classes and not global_pool:
                raise ValueError(f'global_pool is ""; num_classes should then be 0, but is {num_classes}')
            self.avgpool: nn.Module = pooling(global_pool).train(self.training)
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Identity()
        if num_classes:
            like = next(self.parameters())
            fc = nn.Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            nn.init.normal_(fc.weight, std=0.01)
            nn.init.zeros_(fc.bias)
            self.fc = fc.train(self.training)

    def freeze(self, stages: int | Sequence[str]) -> None:
        """Leave a part as it is while the rest trains: no gradients, BatchNorm in evaluation mode throughout.

        Args:
            stages: names among "stem", "layer1", ..., "layer4", "fc"; or a number n from 0 to 4, for the stem and the
                first n layers, as detectors count (the paper's have n = 1).

        Raises:
            ValueError: for another name or number.
        """
        if isinstance(stages, int):
            if isinstance(stages, bool) or not 0 <= stages <= 4:
                raise ValueError(f"freeze is {stages!r}; it should be a number from 0 to 4 or a list of names")
            stages = PARTS[: stages + 1]
        for name in stages:
            if name not in PARTS:
                raise ValueError(unknown_name("part to freeze", str(name), PARTS))
            getattr(self, name).requires_grad_(False)
        self.frozen = tuple(stages)
        self.train(self.training)

    def train(self, mode: bool = True) -> "Self":
        """Training or evaluation mode, for what is not frozen."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        return self

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> features (B, num_features, H/32, W/32)."""
        x = self.maxpool(self.stem(x))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features -> logits (B, num_classes); with ``pre_logits`` the pooled features (B, num_features)."""
        x = self.avgpool(x)
        if self.drop_rate:
            x = F.dropout(x, self.drop_rate, self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
