"""Mean intersection over union, exact for any number of ranks, batch sizes and sizes of pictures.

Shapes: N classes; H x W pixels of a picture and its mask, h x w of the logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.mask_list import IGNORED
from involution.engine.distributed import World, gather_objects, sum_over_ranks

if TYPE_CHECKING:
    from data.segmentation import SegmentationBatch

BAND = 8  # rows enlarged at once: beside logits of 10 MB, 1024 x 2048 with 19 classes takes 4.5 MB; all rows 159 MB


def bands(logits: Tensor, height: int, width: int) -> Iterator[tuple[slice, Tensor]]:
    """Logits (N, h, w) enlarged to (N, H, W), bilinear with align_corners=False, a few rows (N, rows, W) at a time."""
    for start in range(0, height, BAND):
        stop = min(start + BAND, height)
        y = torch.arange(start, stop, device=logits.device, dtype=torch.float32)
        y = ((y + 0.5) * (logits.shape[1] / height) - 0.5).clamp_min(0)
        above = y.floor().long().clamp_max(logits.shape[1] - 1)
        below = (above + 1).clamp_max(logits.shape[1] - 1)
        rows = torch.lerp(logits[:, above], logits[:, below], (y - above)[:, None])
        yield slice(start, stop), F.interpolate(rows[None], (stop - start, width), mode="bilinear")[0]


def logits_of(model: nn.Module, image: Tensor, window: Sequence[int] | None) -> Tensor:
    """The model's float32 logits of a picture (1, 3, H, W): (N, h, w), whole; or (N, H, W), the mean over windows.

    Windows overlap by at least a third, and the last ones end with the picture.
    """
    if window is None or (image.shape[2] <= window[0] and image.shape[3] <= window[1]):
        return model(image)[0].float()
    sides = [min(side, limit) for side, limit in zip(image.shape[2:], window)]
    total = count = None
    for top in _starts(image.shape[2], sides[0]):
        for left in _starts(image.shape[3], sides[1]):
            place = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            logits = model(image[place]).float()
            if total is None or count is None:
                total = logits.new_zeros(logits.shape[1], *image.shape[2:])
                count = logits.new_zeros(image.shape[2:])
            for rows, band in bands(logits[0], *sides):
                total[place][:, rows] += band
            count[place] += 1
    assert total is not None
    assert count is not None
    return total.div_(count)


def _starts(side: int, window: int) -> list[int]:
    count = math.ceil(max(side - window, 0) / max(window * 2 // 3, 1)) + 1
    return [min(i * max(window * 2 // 3, 1), side - window) for i in range(count)]


def classify(model: nn.Module, image: Tensor, size: Sequence[int], window: Sequence[int] | None = None) -> Tensor:
    """The likeliest class of every pixel (H, W) uint8 of a picture (1, 3, H, W)."""
    found = torch.empty(*size, dtype=torch.uint8, device=image.device)
    for rows, band in bands(logits_of(model, image, window), *size):
        found[rows] = band.argmax(0)
    return found


class MeanIou:
    """Counts pixels by their true and predicted class, in float64 on the device.

    A picture at a time goes through the model, so another batch size cannot change anything.

    Args:
        class_names: of the data set, to tell each class's own score; without them there is the mean alone.
        window: see `logits_of`.
        save: is given every sample's index and classes (H, W) uint8.
    """

    def __init__(
        self, class_names: Sequence[str] | None = None, window: Sequence[int] | None = None,
        save: Callable[[int, Tensor], None] | None = None,
    ) -> None:  # fmt: skip
        self.class_names, self.window, self.save = class_names, window, save
        self.counts: Tensor | None = None  # (N, N), true class by predicted class
        self.loss: Tensor | None = None  # sum over the pixels
        self.samples = 0

    def add(self, model: nn.Module, batch: SegmentationBatch) -> None:
        for image, mask, index in zip(batch.images, batch.masks, batch.indices, strict=True):
            logits, found = logits_of(model, image, self.window), []
            classes = len(logits)
            if self.counts is None or self.loss is None:
                self.counts = logits.new_zeros(classes, classes, dtype=torch.float64)
                self.loss = logits.new_zeros((), dtype=torch.float64)
            for rows, band in bands(logits, *mask.shape):
                predicted, truth = band.argmax(0), mask[rows].long()
                cells = torch.where(truth == IGNORED, classes**2, truth * classes + predicted)
                self.counts += torch.bincount(cells.flatten(), minlength=classes**2 + 1)[:-1].view_as(self.counts)
                # as a list of pixels: on GPUs there is no deterministic sum over maps
                loss = F.cross_entropy(band.flatten(1).T, truth.flatten(), ignore_index=IGNORED, reduction="sum")
                self.loss += loss
                found.append(predicted.byte() if self.save else None)
            self.samples += 1
            if self.save:
                self.save(int(index), torch.cat(found))  # type: ignore[arg-type]

    def finish(self, world: World) -> dict[str, Any]:
        classes = max(gather_objects(0 if self.counts is None else len(self.counts)))  # a rank may have had no picture
        sums = torch.zeros(classes**2 + 2, dtype=torch.float64, device=world.device)
        if self.counts is not None and self.loss is not None:
            sums = torch.cat([self.counts.flatten(), self.loss[None], self.loss.new_tensor([self.samples])])
        reduced = sum_over_ranks(sums).cpu()
        counts, (loss, n) = reduced[:-2].view(classes, classes), reduced[-2:].tolist()
        hits, union = counts.diagonal(), counts.sum(0) + counts.sum(1) - counts.diagonal()
        iou = (
            100 * hits / union
        ).tolist()  # NaN for a class that is neither there nor predicted: it has no part in the mean
        there = [score for score in iou if not math.isnan(score)]
        results: dict[str, Any] = {
            "loss": loss / max(counts.sum().item(), 1), "miou": sum(there) / max(len(there), 1), "n": round(n),
        }  # fmt: skip
        if self.class_names is not None:
            results["iou"] = {name: None if math.isnan(score) else score for name, score in zip(self.class_names, iou)}
        return results
