"""Evaluation where the data set's classes are not the model's: eval.py class_map=FILE.

ImageNet-V2, -A and -R have some of ImageNet's classes, or other names for them; ImageNet-ReaL (Beyer et al., 2020) has
any number of labels for each picture.

Shapes: B pictures, T targets (classes or pictures of the data set), N classes of the model.
"""

import dataclasses
import json
import re
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data import Batch, ImageList
from data.datasets import without_excluded
from data.folder import list_folder
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.tasks.classification import Accuracy


class MappedAccuracy(Accuracy):
    """Top-1 and top-5 where any of several classes is right, among the classes that the data set has.

    The loss is -log of the right classes' probability. Pictures without a label count in ``n``, not in the scores.
    """

    def __init__(self, right: Tensor) -> None:
        super().__init__()
        self.right = right  # (T, N) bool

    def count(self, logits: Tensor, batch: Batch) -> None:
        every = self.right = self.right.to(logits.device)
        considered = every.any(0)
        right = every[batch.targets[: batch.valid]]
        logits = logits.masked_fill(~considered, -torch.inf)
        labelled = right.any(1)
        best = logits.topk(min(5, int(considered.sum())), dim=1).indices
        hits = right.gather(1, best)
        loss = -logits.log_softmax(1).masked_fill(~right, -torch.inf).logsumexp(1)
        sums = (labelled.sum(), loss[labelled].sum(), hits[:, 0].sum(), hits.any(1).sum())
        self.sum_up(logits.new_full((), batch.valid), *sums)

    def finish(self, world: World) -> dict[str, Any]:
        n, labelled, loss, top1, top5 = self.totals()
        loss, top1, top5 = (total / max(labelled, 1) for total in (loss, top1, top5))
        scores = {"loss": loss, "top1": 100 * top1, "top5": 100 * top5}
        return scores | {"n": round(n), "labelled": round(labelled)}


def list_images(root: str, exclude: str | None = None) -> ImageList:
    """The pictures of a folder with ``<class>/`` in it or in its ``val/``; there need be none to train on.

    Args:
        exclude: file with pictures to leave out; without it ``root``/excluded.txt counts.

    Raises:
        ValueError: there are none.
    """
    folder = Path(root).absolute()
    images = list_folder(folder / "val" if (folder / "val").is_dir() else folder)
    return without_excluded(folder, exclude, [images])[0]


def apply(file: str, images: ImageList, known: Sequence[str]) -> tuple[ImageList, Tensor]:
    """The pictures with targets that number the rows of ``right`` (T, N).

    Args:
        file: a line for a class of the data set, FOLDER CLASS [CLASS ...], with commas or blanks between, or with tabs
            where names have those; CLASS is a name or number of the model's, and a line with FOLDER alone means the
            same name. Or ``.json`` of ReaL: for each picture of ImageNet's validation set a list of class numbers.
        known: the model's classes, N of them.

    Raises:
        UserError: the file cannot be read, or lacks a class or picture of the data set, or names a class that the model
            does not have.
    """
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"class_map={file} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if file.endswith(".json"):
        targets, sets = np.arange(len(images), dtype=np.int32), _of_pictures(file, text, images)
    else:
        targets, sets = images.targets, _of_classes(file, text, images, known)
    right = torch.zeros(len(sets), len(known), dtype=torch.bool)
    for row, numbers in zip(right, sets, strict=True):
        if wrong := [number for number in numbers if not 0 <= number < len(known)]:
            raise UserError(f"class_map={file}: the model has no class number {wrong[0]}, only {len(known)}")
        row[numbers] = True
    if not right.any():
        raise UserError(f"class_map={file} gives no picture a label")
    return dataclasses.replace(images, targets=targets), right


def _of_classes(file: str, text: str, images: ImageList, known: Sequence[str]) -> list[list[int]]:
    number = {str(i): i for i in range(len(known))} | {name: i for i, name in enumerate(known)}
    found: dict[str, list[int]] = {}
    for line in text.splitlines():
        words = _words(line, number)
        for name in words[1:] or words[:1]:
            if name not in number:
                raise UserError(f"class_map={file}: the model has no class {name} (it has {', '.join(known[:3])}, ...)")
            found.setdefault(words[0], []).append(number[name])
    used = {images.class_names[i] for i in np.unique(images.targets)}
    if missing := sorted(used - found.keys()):
        raise UserError(
            f"class_map={file} lacks {len(missing)} of the data set's classes: {', '.join(missing[:3])}, ..."
        )
    return [found.get(name, []) if name in used else [] for name in images.class_names]


def _words(line: str, known: Container[str]) -> list[str]:
    """FOLDER and classes of a line. Names may have blanks and commas in them, alone or with tabs between."""
    if line.strip() in known:
        return [line.strip()]
    line = line.partition("#")[0].strip()
    return [word.strip() for word in re.split(r"\t+" if "\t" in line else r"[,\s]+", line) if word.strip()]


def _of_pictures(file: str, text: str, images: ImageList) -> list[list[int]]:
    try:
        lists = json.loads(text)
        assert isinstance(lists, list)
        assert all(isinstance(numbers, list) and all(isinstance(n, int) for n in numbers) for numbers in lists)
    except (json.JSONDecodeError, AssertionError) as error:
        raise UserError(
            f"class_map={file} should be a JSON list of lists of class numbers, as ReaL's real.json"
        ) from error
    found = []
    for path in images.paths:
        digits = re.search(r"(\d+)\.\w+$", path)
        if digits is None or not 0 < int(digits[1]) <= len(lists):
            raise UserError(
                f"class_map={file} has {len(lists)} pictures; the name of {path} ends with none of their numbers"
            )
        found.append(lists[int(digits[1]) - 1])
    return found


def class_names(known: Sequence[str] | None, number: int) -> list[str]:
    """The model's classes: as its file names them, or ImageNet's folders where there are 1000, or numbers."""
    if known is not None:
        return [*known, *(str(i) for i in range(len(known), number))]
    if number != 1000:
        return [str(i) for i in range(number)]
    from timm.data import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()
