"""`eval.py predictions=PATH`: what a model says of each image of a data set, to compare two models image by image.

A line an image, once on any number of ranks: index, path (below the data set's folder), target, predicted, correct.
"""

import csv
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from data import Batch, EvalLoader, ImageList
from involution.engine.distributed import World, gather_objects
from involution.engine.errors import UserError
from involution.engine.task import Classification

COLUMNS = ("index", "path", "target", "predicted", "correct")


class Recorded(Classification):
    """Classification that also keeps the likeliest class of every image, in the order of the loader.

    Raises:
        UserError: `name` is no file that can be written; said here, before anything is computed.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.path = Path(name)
        if self.path.suffix != ".csv" or not self.path.absolute().parent.is_dir():
            raise UserError(f"predictions is {name}; it should be a .csv file in a folder that exists")
        self.predicted: list[Tensor] = []

    def counts(self, model: nn.Module, batch: Batch) -> Tensor:
        logits = model(batch.images)
        self.predicted.append(logits[: batch.valid].float().argmax(1).cpu())
        return super().counts(lambda images: logits, batch)  # type: ignore[arg-type]

    def write(self, loader: EvalLoader, world: World) -> None:
        """Gather the ranks' predictions and write them, sorted by index. A collective call."""
        images = loader.dataset
        indices = np.concatenate([request.indices[: request.valid] for request in loader.requests])
        # files that cannot be read have no row (data.on_error=skip)
        indices = np.array([i for i in indices if images.paths[int(i)] not in loader.skipped], int)
        predicted = torch.cat(self.predicted).numpy()
        assert len(indices) == len(predicted)
        parts: list[Any] = gather_objects((indices, predicted))
        if world.is_main:
            rows = sorted(zip(*(np.concatenate(columns).tolist() for columns in zip(*parts))))
            with open(self.path, "w", newline="") as file:
                table = csv.writer(file)
                table.writerow(COLUMNS)
                table.writerows(_line(images, index, guess) for index, guess in rows)


def _line(images: ImageList, index: int, guess: int) -> tuple[int, str, str, str | int, int]:
    folder = os.path.dirname(os.path.dirname(images.paths.prefix))  # none where images lie in shards
    path, target, names = images.paths[index], int(images.targets[index]), images.class_names
    predicted = names[guess] if guess < len(names) else guess  # a model may know more classes than the data set has
    return index, os.path.relpath(path, folder) if folder else path, names[target], predicted, int(guess == target)
