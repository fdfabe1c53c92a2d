"""Anchors, and which box of the truth an anchor or a proposal belongs to."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher

from involution.dense.images import Images

RATIOS = (0.5, 1.0, 2.0)  # height / width


class Anchors(nn.Module):
    """Boxes of given sizes and ratios around every pixel of every level.

    Unlike torchvision's they are not rounded, their strides are those of the levels for any size of image (not
    image // level, which makes 61 of 64 at 800 pixels), and they are float32 under autocast too: in bfloat16 they are
    up to 7 pixels off.

    Args:
        sizes: of each level, in pixels: sqrt(height * width).
        strides: of each level.
    """

    cells: Tensor

    def __init__(self, sizes: Sequence[Sequence[float]], strides: Sequence[int]) -> None:
        super().__init__()
        self.strides = tuple(strides)
        ratio = torch.tensor(RATIOS, dtype=torch.float32).sqrt()[:, None]
        cells = []
        for level in sizes:
            size = torch.tensor(level, dtype=torch.float32)
            height, width = (ratio * size).flatten(), (size / ratio).flatten()
            cells.append(torch.stack([-width, -height, width, height], 1) / 2)
        self.register_buffer("cells", torch.stack(cells), persistent=False)  # (levels, anchors a pixel, 4)

    @property
    def per_pixel(self) -> int:
        """How many anchors a pixel has."""
        return self.cells.shape[1]

    def grid(self, features: Sequence[Tensor]) -> list[Tensor]:
        """The anchors (H * W * per_pixel, 4) of each level (B, C, H, W), as x1, y1, x2, y2."""
        anchors = []
        for cell, stride, x in zip(self.cells.float(), self.strides, features, strict=True):
            rows, columns = (torch.arange(side, device=cell.device) * float(stride) for side in x.shape[-2:])
            y, x = torch.meshgrid(rows, columns, indexing="ij")
            anchors.append((torch.stack([x, y, x, y], -1)[:, :, None] + cell).flatten(0, 2))
        return anchors

    def forward(self, images: Images, features: Sequence[Tensor]) -> list[Tensor]:
        """For each image all its anchors, as torchvision's RegionProposalNetwork wants them."""
        return [torch.cat(self.grid(features))] * len(images.image_sizes)


class LowQualityMatcher(Matcher):
    """Also gives each box of the truth the candidates that overlap it most, when they do so by ``lowest`` at least.

    They become that box's, as in mmdetection, even where they overlap another one more (torchvision leaves them there):
    otherwise a box beside a larger one could be without any. Of several boxes that want a candidate the last has it.
    """

    def __init__(self, high: float, low: float, lowest: float) -> None:
        super().__init__(high, low, allow_low_quality_matches=True)
        self.lowest = lowest

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, overlaps: Tensor) -> None:
        best = overlaps.amax(1, keepdim=True)
        wanted = (overlaps == best) & (best >= self.lowest) & (best > 0)
        number = torch.arange(len(overlaps), device=overlaps.device, dtype=torch.int32)[:, None]
        box = torch.where(wanted, number, -1).amax(0).to(matches.dtype)
        torch.where(box >= 0, box, matches, out=matches)
