"""BatchNorm over a part of the batch ("ghost batches": Hoffer et al., 2017, arXiv 1705.08741)."""

import torch
from torch import Tensor, nn


class GhostBatchNorm2d(nn.BatchNorm2d):
    """In training each `size` images of the batch are normalised by themselves, and counted one after the other.

    Its state is BatchNorm2d's; in evaluation it is BatchNorm2d.
    """

    size: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or len(x) <= self.size:
            return super().forward(x)
        return torch.cat([super(GhostBatchNorm2d, self).forward(part) for part in x.split(self.size)])


def parts_of(norm: nn.BatchNorm2d, images: int) -> int | None:
    """Into how many equal parts it divides so many images; None where they are not equal."""
    if not isinstance(norm, GhostBatchNorm2d) or not norm.training or images <= norm.size:
        return 1
    return None if images % norm.size else images // norm.size
