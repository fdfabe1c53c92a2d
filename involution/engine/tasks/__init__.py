"""What differs between tasks. The loop, checkpoints, ranks, run folder and programs serve any of them.

To add one, write a module with what `Setup` lists, and name it in `task_of`; nothing else asks which task it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from involution.engine.errors import UserError
from involution.models import DENSE

if TYPE_CHECKING:
    from involution.engine.config import EvalConfig, TrainConfig
    from involution.engine.distributed import World
    from involution.loading import Opened


class Batch(Protocol):
    """What a loader hands out. Only the first `valid` of its samples count; the others fill it up, and it may be all
    of them."""

    @property
    def valid(self) -> int: ...

    def to(self, device: torch.device, *, channels_last: bool) -> Any:
        """The batch on the device, copied beside the computation when it lies in pinned memory."""
        ...


class Loader(Protocol):
    """This rank's batches. `skipped` are files that could not be read and were left out, {path: reason}."""

    skipped: dict[str, str]

    def __iter__(self) -> Iterator[Batch]: ...
    def close(self) -> None: ...


class TrainLoader(Loader, Protocol):
    """An endless stream of micro-batches, whose position is nothing but the step (see data/)."""

    @property
    def steps_per_epoch(self) -> int: ...
    def samples(self, step: int) -> int: ...
    def micro_batches(self, step: int) -> int: ...
    def seek(self, step: int) -> None: ...


class Evaluation(Protocol):
    """The score of a model on one data set, batch by batch. Made afresh for every evaluation."""

    def add(self, model: nn.Module, batch: Any) -> None:
        """Count a batch in (in inference mode and under autocast). Keep sums on the device, or what has to be gathered
        as small objects on the CPU: of a whole data set it must fit in memory."""
        ...

    def finish(self, world: World) -> dict[str, Any]:
        """The results in plain Python types: the task's `names` and "n", the number of samples counted over all ranks.

        A collective call, and the same on every rank: sums are reduced (`sum_over_ranks`); objects are gathered, sorted
        by the sample's index and scored once, on rank 0, whose results the others take (`gather_objects`).
        """
        ...


class Task(Protocol):
    """How to train and score a model."""

    names: tuple[str, ...]  # of the numbers that every epoch records, "loss" among them where there is one
    headline: str  # the one that chooses the best checkpoint; the larger the better
    parts: tuple[str, ...]  # names of the parts of the loss, recorded as train_<name>; () where there is one alone

    def loss(self, model: nn.Module, batch: Any) -> Tensor | dict[str, Tensor]:
        """The loss to differentiate, summed over the batch's valid samples: the trainer divides by the samples of the
        global batch. (A mean over the samples of a micro-batch is therefore multiplied by their number.) A dictionary
        has exactly the `parts`, which are added up. It depends on every parameter, whatever the batch holds.
        """
        ...

    def evaluation(self) -> Evaluation: ...


class DataSet(Protocol):
    """A split of a data set."""

    @property
    def class_names(self) -> Sequence[str]: ...
    @property
    def fingerprint(self) -> dict[str, int | str]:
        """What tells it from another, equal on all ranks and after a resume."""
        ...

    def __len__(self) -> int: ...


class Gallery(Protocol):
    """A fixed batch of validation samples, drawn at every evaluation."""

    def draw(self, model: nn.Module) -> dict[str, Tensor]:
        """{title: picture (3, H, W) in [0, 1]}. The model stays as it is: modes, buffers, random state."""
        ...


class Predictor(Protocol):
    """A model at work on pictures of the user's own (eval.py images=...)."""

    columns: tuple[str, ...]  # of the table that output=FILE.csv gets
    channels: int  # of the pictures; other than 1 and 3 they are bands (C, H, W) in [0, 1]

    def predict(self, pictures: Sequence[tuple[Path, Any]]) -> list[Any]:
        """A prediction a picture, without memory of the device."""
        ...

    def text(self, path: Path, prediction: Any) -> str:
        """What the terminal shows."""
        ...

    def as_dict(self, path: Path, prediction: Any) -> dict[str, Any]:
        """What the program's result and output=FILE.json hold."""
        ...

    def rows(self, path: Path, prediction: Any) -> Iterable[Sequence[Any]]: ...

    def draw(self, sheet: Path, predictions: list[tuple[Path, Any]]) -> None:
        """Write the contact sheet, a .png or .pdf."""
        ...


class Setup(Protocol):
    """From the configuration to the objects of a task: a module of this folder. Errors of the user are ValueErrors."""

    DATA: type  # of the configuration's `data`: config.DataConfig or a class derived from it
    AUGMENTATION: type  # of its `augmentation`
    DATASETS: tuple[str, ...]  # values of data.name
    EVAL_BATCH: int | None  # samples that an evaluation takes at once unless told; None: as many as fit
    SIZES_VARY: bool  # whether the pictures of each training step have sizes of their own
    PREPARATION: tuple[str, ...]  # keys of `data` that are part of what a model has learned: eval.py keeps them
    PRINTED: tuple[str, ...]  # results that eval.py prints, in this order

    def check(self, config: TrainConfig, world: World) -> None:
        """Refuse what cannot work before any data is read."""
        ...

    def build(self, config: TrainConfig) -> Task: ...

    def open_dataset(self, d: Any) -> tuple[DataSet, DataSet]:
        """The splits to train and to evaluate on."""
        ...

    def open_val(self, d: Any) -> DataSet:
        """The split to evaluate on alone."""
        ...

    def train_loader(self, split: Any, config: TrainConfig, world: World) -> TrainLoader: ...
    def eval_loader(self, split: Any, d: Any, batch_size: int, world: World) -> Loader: ...

    def input_shape(self, d: Any) -> tuple[int, int, int]:
        """(C, H, W) of a sample, to count a model's operations with."""
        ...

    def gallery(self, split: Any, d: Any) -> Gallery: ...

    def evaluation(self, loader: Any, predictions: str | None) -> Evaluation:
        """For eval.py; `predictions` is where it also writes what the model says of each sample, checked here."""
        ...

    def predictor(self, opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> Predictor:
        """`told` are values of PREPARATION that the command line gives."""
        ...


def task_of(model: str) -> Setup:
    """The task that a model of `create_model` is for."""
    # here, for they import the configuration, whose schema depends on the task
    from involution.engine.tasks import classification, detection, segmentation

    if model in detection.PARTS:
        return detection
    return segmentation if model in DENSE else classification


def check_data(model: str, data: str | None) -> Setup:
    """The task of a model and a data set.

    Raises:
        UserError: they are of different tasks.
    """
    setup = task_of(model)
    if data is not None and data not in setup.DATASETS:
        backbone = "" if model in DENSE else f"; as a detector's or segmentor's backbone: model.backbone.name={model}"
        raise UserError(
            f"model={model} does not go with data={data}: its task takes data={'|'.join(setup.DATASETS)}{backbone}"
        )
    return setup
