"""Masks of instances: what the mask head is trained towards, and its output pasted into the image.

Shape legend: N instances, S x S pixels of a predicted mask (28), H W the image.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
import torchvision  # noqa: F401 (its operators)
from torch import Tensor

AT_ONCE = 2**26  # pixels of masks in floating point: 256 MB


def mask_targets(masks: Tensor, boxes: Tensor, matched: Tensor, size: int) -> Tensor:
    """The part of its mask inside each box, as (N, size, size) of 0 and 1.

    Args:
        masks: (M, H, W) of 0 and 1, at any resolution.
        boxes: (N, 4) in pixels of ``masks``.
        matched: (N,) the mask of each box.
    """
    targets = boxes.new_zeros(len(boxes), size, size)
    step = max(1, AT_ONCE // max(masks[0].numel(), 1)) if len(masks) else 1
    for first in range(0, len(masks), step):
        part = masks[first : first + step]
        mine = slice(None) if step >= len(masks) else (matched >= first) & (matched < first + step)
        rois = torch.cat([(matched[mine] - first)[:, None].to(boxes.dtype), boxes[mine]], 1)
        # the operator itself: torchvision's function takes a detour in deterministic mode, for the sake of gradients
        cut = torch.ops.torchvision.roi_align(part[:, None].to(boxes.dtype), rois, 1.0, size, size, 0, True)
        targets[mine] = (cut[:, 0] >= 0.5).to(boxes.dtype)
    return targets


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Iterator[Tensor]:
    """Predicted masks in the whole image, one after the other: bool (H, W).

    All N at once would take 1.2 GB at 100 masks of 4000 x 3000 pixels; a caller that keeps each as run lengths needs
    the memory of one. Only pixels inside a box are computed.

    Args:
        masks: (N, S, S) probabilities inside the boxes.
        boxes: (N, 4) in pixels of the image.
        size: H and W of the image.
        threshold: of the probability.
    """
    height, width = size
    for mask, (x1, y1, x2, y2) in zip(masks.float(), boxes.tolist(), strict=True):
        pasted = torch.zeros(height, width, dtype=torch.bool, device=masks.device)
        columns = slice(max(0, math.floor(x1)), min(width, math.ceil(x2)))
        rows = slice(max(0, math.floor(y1)), min(height, math.ceil(y2)))
        if x2 > x1 and y2 > y1 and pasted[rows, columns].numel():
            x = torch.arange(columns.start, columns.stop, device=masks.device) + 0.5
            y = torch.arange(rows.start, rows.stop, device=masks.device) + 0.5
            x, y = (x - x1) / (x2 - x1) * 2 - 1, (y - y1) / (y2 - y1) * 2 - 1  # -1 to 1 inside the box
            grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
            sampled = F.grid_sample(mask[None, None], grid[None], align_corners=False)
            pasted[rows, columns] = sampled[0, 0] >= threshold
        yield pasted


def zero_loss(parameters: Sequence[Tensor]) -> Tensor:
    """0, with a gradient of 0 for each: of a head that had nothing to do, so that ranks agree on what has gradients."""
    return torch.stack([p.sum() * 0 for p in parameters]).sum()
