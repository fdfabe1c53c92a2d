"""Loaders of pictures with masks: workers decode, crop and hand out 8 bits; the device distorts and normalises.

Augmentation is that of the paper's appendix A.3, as pure functions of (seed, epoch, sample): random resize, a crop that
is drawn again while one class covers most of it, flip, photometric distortion.

Shapes: b samples a batch, H x W pixels of a picture, h x w of a training crop.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import adjust_hue

from data import sampling
from data.decode import BadImageError
from data.loader import EvalLoader, TrainLoader, arrange
from data.mask_list import IGNORED, MaskList
from data.sampling import MicroBatch, Plan
from data.torch_loader import TorchBackend
from data.transforms import normalise

WINDOWS = 10  # crops that are tried
# places of a sample's numbers among its draws
_SCALE, _WINDOWS, _FLIP, _DISTORT = 0, 1, 1 + 2 * WINDOWS, 2 + 2 * WINDOWS


class SegmentationBatch(NamedTuple):
    """In training images (b, 3, h, w) normalised and masks (b, h, w) uint8; in evaluation, where sizes may differ,
    lists of (1, 3, H, W) and (H, W). `indices` (b,) of the samples; only the first `valid` count."""

    images: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    indices: np.ndarray
    valid: int

    def to(self, device: torch.device, *, channels_last: bool) -> "SegmentationBatch":
        """The batch on the device, copied beside the computation when it lies in pinned memory."""
        form = torch.channels_last if channels_last else torch.contiguous_format
        if isinstance(self.images, Tensor):
            images: Tensor | list[Tensor] = self.images.to(device, non_blocking=True, memory_format=form)
        else:
            images = [image.to(device, non_blocking=True, memory_format=form) for image in self.images]
        return self._replace(images=images, masks=_move(self.masks, device))


class LoadedMasks(NamedTuple):
    """What a worker hands out: pictures and masks in 8 bits, (b, h, w, 3) and (b, h, w) or lists of other sizes."""

    pictures: Tensor | list[Tensor]
    masks: Tensor | list[Tensor]
    draws: np.ndarray  # (b, ...) of the samples
    indices: np.ndarray
    valid: int
    bad: list[BadImageError]

    def to(self, device: torch.device) -> "LoadedMasks":
        return self._replace(pictures=_move(self.pictures, device), masks=_move(self.masks, device))


def _move(x: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    if isinstance(x, Tensor):
        return x.to(device, non_blocking=True)
    return [each.to(device, non_blocking=True) for each in x]


@dataclass(frozen=True)
class MaskAugmentation:
    """How a training sample is made.

    Attributes:
        size: (h, w) of the crop.
        scale: range of the factor that a picture is resized by.
        max_class_share: of a crop's pixels that count, above which another crop is drawn.
        flip: probability of mirroring.
        photometric: whether brightness, contrast, saturation and hue vary.
        fill: colour (3,) in 8 bits of what lies outside of a picture smaller than the crop.
    """

    seed: int
    size: tuple[int, int]
    scale: tuple[float, float]
    max_class_share: float
    flip: float
    photometric: bool
    fill: tuple[int, int, int]

    def __post_init__(self) -> None:
        if min(self.size) < 1 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(
                f"train_size {self.size} must be positive, and scale {self.scale} (low, high), 0 < low <= high"
            )

    def draws(self, epoch: int, indices: np.ndarray) -> np.ndarray:
        return sampling.draws(self.seed, epoch, indices)

    def cut(self, image: Image.Image, classes: np.ndarray, draw: Sequence[float]) -> tuple[Tensor, Tensor]:
        """A crop of the resized picture (h, w, 3) and of its classes (h, w); IGNORED outside of the picture."""
        factor = self.scale[0] + draw[_SCALE] * (self.scale[1] - self.scale[0])
        height, width = (max(1, round(side * factor)) for side in classes.shape)
        resized = np.asarray(Image.fromarray(classes).resize((width, height), Image.Resampling.NEAREST))
        h, w = min(height, self.size[0]), min(width, self.size[1])
        for window in range(WINDOWS):
            y, x = draw[_WINDOWS + 2 * window : _WINDOWS + 2 * window + 2]
            top, left = int(y * (height - h + 1)), int(x * (width - w + 1))
            mask = resized[top : top + h, left : left + w]
            counts = np.bincount(mask.ravel(), minlength=256)[:IGNORED]
            if counts.max() <= self.max_class_share * counts.sum() and counts.any():
                break
        box = np.array([left / width, top / height, (left + w) / width, (top + h) / height])
        box *= [image.width, image.height, image.width, image.height]
        picture = image.resize((w, h), Image.Resampling.BILINEAR, box=tuple(box.clip(0, [*image.size] * 2)))
        full = np.full((*self.size, 3), self.fill, np.uint8)
        labels = np.full(self.size, IGNORED, np.uint8)
        full[:h, :w], labels[:h, :w] = np.asarray(picture), mask
        if draw[_FLIP] < self.flip:
            full, labels = full[:, ::-1], labels[:, ::-1]
        return torch.from_numpy(full.copy()), torch.from_numpy(labels.copy())


def distort(picture: Tensor, draw: Sequence[float]) -> Tensor:
    """Vary brightness, contrast, saturation and hue of a picture (h, w, 3) in [0, 255], each with probability 1/2.

    As in Liu et al. (SSD, ECCV 2016) without the permutation of channels; `draw` has 10 numbers in [0, 1).
    """
    late, brightness, contrast, saturation, hue = (draw[i] < 0.5 for i in range(5))
    by = draw[5:]
    if brightness:
        picture = (picture + 64 * by[0] - 32).clamp(0, 255)
    if contrast and not late:
        picture = (picture * (0.5 + by[1])).clamp(0, 255)
    if saturation:
        picture = saturate(picture, 0.5 + by[2])
    if hue:  # by up to 36 degrees
        picture = 255 * adjust_hue(picture.permute(2, 0, 1) / 255, 0.2 * by[3] - 0.1).permute(1, 2, 0)
    if contrast and late:
        picture = (picture * (0.5 + by[1])).clamp(0, 255)
    return picture


def saturate(picture: Tensor, factor: float) -> Tensor:
    """Multiply the saturation of HSV: (h, w, 3), value and hue stay."""
    value = picture.amax(-1, keepdim=True)
    spread = value - picture.amin(-1, keepdim=True)
    return value - (value - picture) * (value / spread.clamp_min(1e-6)).clamp(max=factor)


@dataclass(frozen=True)
class MaskSettings:
    """How pairs become batches. Without an augmentation they stay whole. mean and std are in units of [0, 1].

    `window` (h, w) is what an evaluation slides over a picture; None: pictures go through the model whole.
    """

    images: MaskList
    augmentation: MaskAugmentation | None
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    workers: int
    window: tuple[int, int] | None = None


class _Pairs(Dataset[LoadedMasks]):
    """Map-style data set whose items are whole micro-batches."""

    def __init__(self, settings: MaskSettings) -> None:
        self.settings = settings

    def __getitem__(self, request: MicroBatch) -> LoadedMasks:
        if self.settings.augmentation is None:
            return self._whole(request)
        augmentation = self.settings.augmentation
        draws = augmentation.draws(request.epoch, request.indices)
        rows = [self._row(int(i), draw) for i, draw in zip(request.indices, draws, strict=True)]
        bad = [row for row in rows[: request.valid] if isinstance(row, BadImageError)]
        blank = torch.zeros(*augmentation.size, 3, dtype=torch.uint8), torch.full(augmentation.size, IGNORED).byte()
        places = np.arange(len(rows))
        good, places, valid = arrange(rows, places, request.valid, blank)
        pictures, masks = (torch.stack(parts) for parts in zip(*good))
        return LoadedMasks(pictures, masks, draws[places], request.indices[places], valid, bad)

    def _row(self, index: int, draw: np.ndarray) -> tuple[Tensor, Tensor] | BadImageError:
        assert self.settings.augmentation is not None
        try:
            return self.settings.augmentation.cut(*self.settings.images.read(index), draw.tolist())
        except BadImageError as error:
            return error  # not raised here: a DataLoader would wrap the message in a traceback of its worker

    def _whole(self, request: MicroBatch) -> LoadedMasks:
        pictures, masks, indices, bad = [], [], [], []
        for index in request.indices[: request.valid]:
            try:
                image, classes = self.settings.images.read(int(index))
            except BadImageError as error:
                bad.append(error)
                continue
            pictures.append(torch.from_numpy(np.array(image)))
            masks.append(torch.from_numpy(classes))
            indices.append(index)
        return LoadedMasks(pictures, masks, np.zeros((0, 0)), np.array(indices, int), len(indices), bad)


class MaskTrainLoader(TrainLoader):
    """See TrainLoader."""

    def _accept(self, loaded: LoadedMasks) -> SegmentationBatch:
        self._note(loaded.bad, loaded.valid)
        s: MaskSettings = self.settings
        pictures = loaded.pictures
        assert s.augmentation is not None
        assert isinstance(pictures, Tensor)
        if s.augmentation.photometric:
            numbers = loaded.draws[:, _DISTORT : _DISTORT + 10].tolist()
            pictures = torch.stack([distort(x.float(), draw) for x, draw in zip(pictures, numbers, strict=True)])
        images = normalise(pictures, s.mean, s.std)
        return SegmentationBatch(images, loaded.masks, loaded.indices, loaded.valid)


class MaskEvalLoader(EvalLoader):
    """See EvalLoader; pictures are whole, each of its own size."""

    def _accept(self, loaded: LoadedMasks) -> SegmentationBatch:
        self._note(loaded.bad, loaded.valid)
        s: MaskSettings = self.settings
        images = [normalise(picture[None], s.mean, s.std) for picture in loaded.pictures]
        return SegmentationBatch(images, loaded.masks, loaded.indices, loaded.valid)


def train_loader(settings: MaskSettings, plan: Plan, seed: int, on_error: str) -> MaskTrainLoader:
    """Endless training batches of crops; order and augmentation are functions of (seed, epoch, sample)."""
    backend = TorchBackend(_Pairs(settings), settings.workers, settings.device)
    return MaskTrainLoader(backend, settings, plan, seed, on_error)


def eval_loader(settings: MaskSettings, batch_size: int, rank: int, world_size: int, on_error: str) -> MaskEvalLoader:
    """Whole pictures: sample p goes to rank p % world_size; every rank gets equally many batches."""
    requests = sampling.eval_batches(len(settings.images), batch_size, rank, world_size)
    backend = TorchBackend(_Pairs(settings), settings.workers, settings.device)
    return MaskEvalLoader(backend, settings, requests, on_error)
