"""Segmentation: a class for every pixel. Cross-entropy and mean IoU; see Setup in this folder's __init__.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import MISSING
from torch import Tensor, nn
from torch.nn import functional as F

from data import cityscapes, mask_list, segmentation
from data.mask_list import IGNORED, MaskList
from data.sampling import Plan
from involution import dense
from involution.engine.config import EvalConfig, TrainConfig
from involution.engine.distributed import World, synchronised
from involution.engine.errors import UserError
from involution.engine.tasks.mean_iou import MeanIou
from involution.engine.tasks.overlays import Overlays
from involution.engine.tasks.segmented_pictures import LabelFiles, SegmentedPictures, label_names
from involution.loading import Opened

if TYPE_CHECKING:
    from data.segmentation import MaskEvalLoader, MaskTrainLoader, SegmentationBatch


@dataclass
class SegmentationData:
    """The configuration's `data`."""

    name: str = MISSING
    root: str | None = MISSING
    classes: list[str] | None = MISSING
    workers: int = MISSING
    train_size: tuple[int, int] = MISSING  # height and width of a crop
    window: Any = MISSING  # height and width of what slides over a picture in evaluation; null: it stays whole
    mean: list[float] = MISSING
    std: list[float] = MISSING
    on_error: str = MISSING


@dataclass
class SegmentationAugmentation:
    """The configuration's `augmentation`."""

    scale: tuple[float, float] = MISSING
    max_class_share: float = MISSING
    hflip: float = MISSING
    photometric: bool = MISSING


DATA: type = SegmentationData
AUGMENTATION: type = SegmentationAugmentation
DATASETS: tuple[str, ...] = ("cityscapes", "demo_segmentation", "segmentation_folder")
EVAL_BATCH: int | None = None
SIZES_VARY: bool = False
PREPARATION: tuple[str, ...] = ("train_size", "window", "mean", "std", "classes")
PRINTED: tuple[str, ...] = ("miou", "loss", "n", "iou")


class Segmentation:
    """Cross-entropy, a mean over a picture's pixels; mean intersection over union in percent.

    Args:
        outputs: of the model in training: "out", and "aux" of an auxiliary head, whose loss counts `aux_weight`.
        window: see mean_iou.logits_of.
    """

    names: tuple[str, ...] = ("loss", "miou")
    headline = "miou"

    def __init__(
        self, outputs: tuple[str, ...] = ("out",), aux_weight: float = 0.4, label_smoothing: float = 0.0,
        window: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        self.parts: tuple[str, ...] = tuple(f"loss_{name}" for name in outputs) if len(outputs) > 1 else ()
        self.outputs, self.weights = outputs, {"out": 1.0, "aux": aux_weight}
        self.label_smoothing, self.window = label_smoothing, window

    def loss(self, model: nn.Module, batch: SegmentationBatch) -> Tensor | dict[str, Tensor]:
        logits, masks = model(batch.images), batch.masks
        assert isinstance(masks, Tensor)
        counted = torch.arange(len(masks), device=masks.device) < batch.valid
        masks = masks.where(counted[:, None, None], IGNORED).long()
        losses = {f"loss_{name}": self.weights[name] * self._loss(logits[name], masks) for name in self.outputs}
        return losses if self.parts else losses["loss_out"]

    def _loss(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Of a head's logits at any resolution; pixels that do not count are part of the mean, with 0, as released."""
        size = masks.shape[-2:]
        logits = F.interpolate(logits.float(), size, mode="bilinear", align_corners=False)
        pixels = logits.permute(0, 2, 3, 1).flatten(0, 2)  # on GPUs there is no deterministic sum over maps
        total = F.cross_entropy(
            pixels, masks.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=self.label_smoothing
        )
        return total / size.numel()

    def evaluation(self) -> MeanIou:
        return MeanIou(window=self.window)


def check(config: TrainConfig, world: World) -> None:
    _model_class(config)
    o = config.train
    if o.loss != "cross_entropy":
        raise UserError(f"train.loss={o.loss} is for classifiers; set it to cross_entropy")
    if o.freeze is not None:
        raise UserError("train.freeze is for classifiers; a segmentor's is model.backbone.freeze")
    alone = not synchronised(o.sync_batchnorm, world) or world.size == 1
    if _model_class(config).pools_to_a_pixel and o.batch_size == 1 and alone:
        raise UserError(
            f"model={config.model['name']} pools a picture into one pixel, and with train.batch_size=1 nothing to "
            "normalise that over: use train.batch_size=2 or more, or train.sync_batchnorm=true on several GPUs"
        )
    _window(config.data)


def _model_class(config: TrainConfig) -> Any:
    return dense.MODELS[config.model["name"]]


def _window(d: SegmentationData) -> tuple[int, int] | None:
    if d.window is None:
        return None
    try:
        height, width = map(int, d.window)
    except (TypeError, ValueError):
        height = width = 0
    if min(height, width) < 32:
        raise UserError(f"data.window={d.window} should be [height,width] of at least 32 pixels, or null")
    return height, width


def build(config: TrainConfig) -> Segmentation:
    model = _model_class(config)
    return Segmentation(model.outputs, model.aux_weight, config.train.label_smoothing, _window(config.data))


def open_dataset(d: SegmentationData) -> tuple[MaskList, MaskList]:
    if d.name == "demo_segmentation":
        return cityscapes.open_demo(d.root)
    if d.name == "cityscapes":
        return cityscapes.open_cityscapes(d.root, on_error=d.on_error)
    return mask_list.open_folder(d.root, d.classes, d.on_error)


def open_val(d: SegmentationData) -> MaskList:
    if d.name == "segmentation_folder":
        return mask_list.open_split(d.root, d.classes, "val", d.on_error)
    return open_dataset(d)[1]  # Cityscapes may have val alone


def train_loader(split: MaskList, config: TrainConfig, world: World) -> MaskTrainLoader:
    d, a, o = config.data, config.augmentation, config.train
    fill = tuple(round(255 * value) for value in d.mean)
    augmentation = segmentation.MaskAugmentation(
        config.seed, tuple(d.train_size), tuple(a.scale), a.max_class_share, a.hflip, a.photometric, fill,  # type: ignore
    )  # fmt: skip
    plan = Plan(len(split), o.batch_size, o.global_batch_size, world.rank, world.size)
    return segmentation.train_loader(_settings(split, d, augmentation, world), plan, config.seed, d.on_error)


def eval_loader(split: MaskList, d: SegmentationData, batch_size: int, world: World) -> MaskEvalLoader:
    if not len(split):
        raise UserError(f"data={d.name} in {d.root} has no samples to evaluate on")
    return segmentation.eval_loader(_settings(split, d, None, world), batch_size, world.rank, world.size, d.on_error)


def _settings(
    split: MaskList, d: SegmentationData, augmentation: segmentation.MaskAugmentation | None, world: World
) -> segmentation.MaskSettings:
    return segmentation.MaskSettings(split, augmentation, d.mean, d.std, world.device, d.workers, _window(d))


def input_shape(d: SegmentationData) -> tuple[int, int, int]:
    return 3, *d.train_size


def gallery(split: MaskList, d: SegmentationData) -> Overlays:
    return Overlays(split, d.mean, d.std, _window(d))


def evaluation(loader: MaskEvalLoader, predictions: str | None) -> MeanIou:
    settings: Any = loader.settings
    split: MaskList = settings.images
    if predictions is None:
        return MeanIou(split.class_names, settings.window)
    files = LabelFiles(predictions, split.values)
    names = label_names([split.images[i].removesuffix(cityscapes.PICTURE) for i in range(len(split))])

    def save(index: int, classes: Tensor) -> None:
        files.write(names[index], classes)

    return MeanIou(split.class_names, settings.window, save)


def predictor(opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> SegmentedPictures:
    return SegmentedPictures(opened, config, told, device)
