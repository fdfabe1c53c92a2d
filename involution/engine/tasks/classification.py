"""Classification: one label a picture. Cross-entropy, top-1 and top-5; see Setup in this folder's __init__.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import data
from involution.engine.augmentation import AugmentationConfig
from involution.engine.config import DataConfig, EvalConfig, TrainConfig
from involution.engine.distributed import World, gather_objects, sum_over_ranks
from involution.engine.errors import UserError
from involution.engine.outputs import output_file, write_table
from involution.engine.tasks.classified_pictures import ClassifiedPictures
from involution.engine.tasks.heat_maps import HeatMaps
from involution.engine.tasks.losses import BinaryCrossEntropy, CrossEntropy
from involution.loading import Opened
from involution.models import create_model, from_timm, without_weights

if TYPE_CHECKING:
    from data import Batch, EvalLoader, ImageList

DATA: type = DataConfig
AUGMENTATION: type = AugmentationConfig
DATASETS: tuple[str, ...] = ("demo", "imagenet", "imagenette", "cifar10", "folder")
EVAL_BATCH: int | None = None
SIZES_VARY: bool = False
PREPARATION: tuple[str, ...] = ("train_size", "val_size", "val_resize", "mean", "std")
PRINTED: tuple[str, ...] = ("top1", "top5", "loss", "n")
COLUMNS = ("index", "path", "target", "predicted", "correct")  # of predictions=FILE.csv


class Classification:
    """Any loss of a batch's logits (b, K); top-1 and top-5 accuracy in percent, and the plain cross-entropy of them."""

    names: tuple[str, ...] = ("loss", "top1", "top5")
    headline = "top1"
    parts: tuple[str, ...] = ()

    def __init__(self, criterion: Callable[[Tensor, Batch], Tensor] | None = None) -> None:
        self.criterion = criterion or CrossEntropy()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.criterion(model(batch.images)[: batch.valid].float(), batch)

    def evaluation(self) -> Accuracy:
        return Accuracy()


class Accuracy:
    """Sums over the valid rows of batches, so that adding them up is exact: samples, loss, hits, hits among five."""

    def __init__(self, class_names: Sequence[str] = ()) -> None:
        """class_names: of the data set, where the result is to have each class's top-1 accuracy too."""
        self.counts: Tensor | None = None
        self.class_names = class_names
        self.of_classes: Tensor | None = None  # (classes, 2): hits, images

    def add(self, model: nn.Module, batch: Batch) -> None:
        self.count(model(batch.images)[: batch.valid].float(), batch)

    def count(self, logits: Tensor, batch: Batch) -> None:
        targets = batch.targets[: batch.valid]
        numbers = logits.isfinite().all(1, keepdim=True)  # the order of others means nothing
        ranked = (logits.topk(min(5, logits.shape[1]), dim=1).indices == targets[:, None]) & numbers
        sums = (cross_entropy(logits, targets, reduction="sum"), ranked[:, :1].sum(), ranked.sum())
        self.sum_up(logits.new_full((), batch.valid), *sums)
        if self.class_names:
            found = torch.stack([ranked[:, 0].double(), torch.ones_like(targets, dtype=torch.float64)], dim=1)
            if self.of_classes is None:
                self.of_classes = found.new_zeros(len(self.class_names), 2)
            self.of_classes.index_add_(0, targets, found)

    def sum_up(self, *counts: Tensor) -> None:
        """Add the counts of a batch to those of the batches before."""
        added = torch.stack(counts).double()
        self.counts = added if self.counts is None else self.counts + added

    def totals(self) -> list[float]:
        """The counts of all batches of all ranks."""
        assert self.counts is not None, "a loader yields at least one (possibly all padding) batch"
        return sum_over_ranks(self.counts).tolist()

    def finish(self, world: World) -> dict[str, Any]:
        n, *sums = self.totals()
        loss, top1, top5 = (total / max(n, 1) for total in sums)
        scores = {"loss": loss, "top1": 100 * top1, "top5": 100 * top5, "n": round(n)}
        if not self.class_names:
            return scores
        assert self.of_classes is not None
        rows = zip(self.class_names, sum_over_ranks(self.of_classes).tolist(), strict=True)
        return scores | {
            "classes": {name: {"top1": 100 * hits / n if n else None, "n": round(n)} for name, (hits, n) in rows}
        }


class RecordedAccuracy(Accuracy):
    """Also writes the likeliest class of every image, to compare two models image by image.

    A line an image, once on any number of ranks: index, path (below the data set's folder), target, predicted, correct.

    Raises:
        UserError: `name` is no file that can be written; said here, before anything is computed.
    """

    def __init__(self, name: str, loader: EvalLoader) -> None:
        super().__init__(loader.dataset.class_names)
        self.path, self.loader = output_file("predictions", name, ".csv"), loader
        self.predicted: list[Tensor] = []

    def count(self, logits: Tensor, batch: Batch) -> None:
        self.predicted.append(logits.argmax(1).cpu())
        super().count(logits, batch)

    def finish(self, world: World) -> dict[str, Any]:
        images, loader = self.loader.dataset, self.loader
        indices = np.concatenate([request.indices[: request.valid] for request in loader.requests])
        # files that cannot be read have no row (data.on_error=skip)
        indices = np.array([i for i in indices if images.paths[int(i)] not in loader.skipped], int)
        predicted = torch.cat(self.predicted).numpy()
        assert len(indices) == len(predicted)
        parts: list[Any] = gather_objects((indices, predicted))
        if world.is_main:
            rows = sorted(zip(*(np.concatenate(columns).tolist() for columns in zip(*parts))))
            write_table(self.path, COLUMNS, (_line(images, index, guess) for index, guess in rows))
        return super().finish(world)


def _line(images: ImageList, index: int, guess: int) -> tuple[int, str, str, str | int, int]:
    folder = os.path.dirname(os.path.dirname(images.paths.prefix))  # none where images lie in shards
    path, target, names = images.paths[index], int(images.targets[index]), images.class_names
    predicted = names[guess] if guess < len(names) else guess  # a model may know more classes than the data set has
    return index, os.path.relpath(path, folder) if folder else path, names[target], predicted, int(guess == target)


def check(config: TrainConfig, world: World) -> None:
    d, a = config.data, config.augmentation
    a.check(config.train.batch_size, config.train.global_batch_size)
    data.check_bands(len(d.mean), d.loader, a.policies(d.mean))
    if "library" in config.model:
        with torch.device("meta"):
            model = create_model(**without_weights(config.model))
        sizes = d.train_size
        sizes = list(sizes.values()) if isinstance(sizes, dict) else [sizes]
        from_timm.check_sizes(model, config.model, [*sizes, d.val_size])


def build(config: TrainConfig) -> Classification:
    o = config.train
    if o.loss == "bce":
        return Classification(BinaryCrossEntropy(o.label_smoothing, o.target_threshold))
    return Classification(CrossEntropy(o.label_smoothing))


def open_dataset(d: DataConfig) -> tuple[ImageList, ImageList]:
    return data.open_dataset(d.name, d.root, d.exclude)


def open_val(d: DataConfig) -> ImageList:
    return open_dataset(d)[1]  # whose classes are numbered as train's folders


def train_loader(split: ImageList, config: TrainConfig, world: World) -> data.TrainLoader:
    d, a, o = config.data, config.augmentation, config.train
    if len(split.class_names) == 1:
        name = split.class_names[0]
        below = [] if d.root is None else sorted(p for p in Path(d.root).glob(f"train/{name}/*") if p.is_dir())
        deeper = f": classes are the folders in train/, and {below[0]} is one level too deep" if below else ""
        raise UserError(f"the data set has one class, {name!r}, so there is nothing to tell apart{deeper}")
    return data.train_loader(
        split,
        global_batch_size=o.global_batch_size, batch_size=o.batch_size, rank=world.rank, world_size=world.size,
        seed=config.seed, train_size=d.train_size, scale=a.scale, ratio=a.ratio, flip=a.hflip,
        policies=a.policies(d.mean), erasing=a.erasing, mixing=a.mixing(config.seed), repeats=a.repeats,
        **_loading(d, world),
    )  # fmt: skip


def eval_loader(split: ImageList, d: DataConfig, batch_size: int, world: World) -> EvalLoader:
    return data.eval_loader(
        split, batch_size=batch_size, rank=world.rank, world_size=world.size,
        val_size=d.val_size, val_resize=d.val_resize, **_loading(d, world),
    )  # fmt: skip


def _loading(d: DataConfig, world: World) -> dict[str, Any]:
    automatic = "mixed" if world.device.type == "cuda" else "cpu"
    if d.decoder == "mixed" and automatic == "cpu":
        raise UserError("data.decoder=mixed decodes on a GPU, and there is none here; use data.decoder=cpu or auto")
    return {
        "mean": d.mean, "std": d.std, "loader": d.loader, "workers": d.workers,
        "decoder": automatic if d.decoder == "auto" else d.decoder,
        "max_pixels": d.max_pixels, "on_error": d.on_error, "device": world.device,
    }  # fmt: skip


def input_shape(d: DataConfig) -> tuple[int, int, int]:
    return len(d.mean), d.val_size, d.val_size


def gallery(split: ImageList, d: DataConfig) -> HeatMaps:
    return HeatMaps(split, d)


def evaluation(loader: EvalLoader, predictions: str | None) -> Accuracy:
    return Accuracy(loader.dataset.class_names) if predictions is None else RecordedAccuracy(predictions, loader)


def predictor(opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> ClassifiedPictures:
    return ClassifiedPictures(opened, config, told, device)
