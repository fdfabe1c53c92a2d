"""Data sets by name. Each is two lists of images in the end: folders of classes, tar shards, or parquet files."""

import dataclasses
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.demo import demo_root, write_once
from data.exclusion import Exclusions
from data.flat import has_images, list_flat
from data.folder import list_folder
from data.image_list import ImageList
from data.parquet import list_parquet, parquet_files
from data.shards import has_shards, list_shards
from involution.cache import writable_cache_dir
from involution.checks import few

log = logging.getLogger("involution.data")

NEAR = {"train": ("training", "Train", "TRAIN"), "val": ("valid", "validation", "test", "Val", "VAL")}
EXCLUDED = "excluded.txt"  # in the data set's folder; written by scripts/check_dataset.py


class DataSplits(NamedTuple):
    train: ImageList
    val: ImageList


def open_dataset(
    name: str, root: str | os.PathLike[str] | None = None, exclude: str | os.PathLike[str] | None = None
) -> DataSplits:
    """Lists a data set's images.

    Args:
        name: demo, imagenet, imagenette, cifar10 or folder. demo is written, imagenette and cifar10 are downloaded into
            the cache folder when they are not there yet.
        root: its folder, with train/<class>/ and val/<class>/, or shards train-*.tar and val-*.tar, or parquet files
            train-*.parquet and validation-*.parquet (or val-*), there or in data/. imagenet also takes the original
            flat val/ together with val.txt or the development kit.
        exclude: file with images to leave out, a path relative to `folder_of(name, root)` a line; without it that
            folder's excluded.txt counts.

    Raises:
        ValueError: the folder is missing or empty, or val has classes that train lacks.
    """
    base = folder_of(name, root)
    train = _list(base, "train")
    val = "test" if name == "cifar10" and not (base / "val").exists() else "val"
    if name == "imagenet" and has_images(base / val):
        splits = DataSplits(train, list_flat(base, train.class_names))
    else:
        splits = DataSplits(train, numbered(_list(base, val, may_be_empty=True), train.class_names, base))
    return DataSplits(*without_excluded(base, exclude, splits))


def folder_of(name: str, root: str | os.PathLike[str] | None) -> Path:
    """The folder with the pictures of a data set, below `root` where it was downloaded; errors as in `open_dataset`."""
    prepare: dict[str, Callable[[str | os.PathLike[str] | None], Path]] = {
        "demo": demo_root,
        "imagenet": _given,
        "imagenette": _imagenette,
        "cifar10": _cifar10,
        "folder": _given,
    }
    if name not in prepare:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(prepare)}")
    base = Path(os.path.abspath(prepare[name](root)))
    if not base.is_dir():
        raise ValueError(f"data folder {str(base)!r} does not exist; set data.root to the folder with train/ and val/")
    return base


def without_excluded(
    base: Path, exclude: str | os.PathLike[str] | None, lists: Sequence[ImageList]
) -> Sequence[ImageList]:
    """Lists of images below `base` without those of the file `exclude` or, where that is None, `base`/excluded.txt."""
    listed = base / EXCLUDED if exclude is None else Path(exclude)
    if exclude is None and not listed.is_file():
        return lists
    exclusions = Exclusions(listed, base)
    kept = [exclusions.without(images) for images in lists]
    exclusions.report()
    return kept


def _list(base: Path, split: str, may_be_empty: bool = False) -> ImageList:
    """`may_be_empty`: classes without images are no error."""
    if (base / split).exists():
        return list_folder(base / split, may_be_empty)
    if has_shards(base, split):
        return list_shards(base, split)
    if parquet_files(base, split):
        return list_parquet(base, split)
    near = next((f", and {name} should be called so" for name in NEAR[split] if (base / name).is_dir()), "")
    raise ValueError(
        f"data folder {str(base)!r} has no folder {split}{near}; expected {base}/{split}/<class>/<image>.jpg, shards "
        f"{split}-*.tar or parquet files {split}-*.parquet"
    )


def present(base: Path) -> bool:
    """Whether there is something to train on."""
    return (base / "train").exists() or has_shards(base, "train") or bool(parquet_files(base, "train"))


def _given(root: str | os.PathLike[str] | None) -> Path:
    if not root:
        raise ValueError("this data set needs its folder: set data.root to the folder with train/ and val/")
    return Path(root)


def _imagenette(root: str | os.PathLike[str] | None) -> Path:
    """An existing folder with train/, or torchvision's download (1.5 GB)."""
    base = Path(root) if root else writable_cache_dir() / "imagenette"
    if present(base):
        return base

    def download(folder: Path) -> None:
        from torchvision.datasets import Imagenette

        Imagenette(folder, download=True)

    return _downloaded(base / "imagenette2-full", download, "Imagenette") / "imagenette2"


def _cifar10(root: str | os.PathLike[str] | None) -> Path:
    """An existing folder with train/, or torchvision's download as a folder of PNGs."""
    base = Path(root) if root else writable_cache_dir() / "cifar10"
    if present(base):
        return base

    def write(folder: Path) -> None:
        from torchvision.datasets import CIFAR10

        for split in ("train", "val"):
            images = CIFAR10(base, train=split == "train", download=True)
            for name in images.classes:
                (folder / split / name).mkdir(parents=True)
            for number, (picture, target) in enumerate(images):
                picture.save(folder / split / images.classes[target] / f"{number:05d}.png", compress_level=1)

    return _downloaded(base / "png", write, "CIFAR-10")


def _downloaded(target: Path, write: Callable[[Path], None], name: str) -> Path:
    try:
        return write_once(target, write)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors; torchvision raises RuntimeError
        raise ValueError(
            f"{name} is not in {str(target.parent)!r} and could not be downloaded ({error}); "
            "set data.root to a folder with train/ and val/"
        ) from error


def numbered(val: ImageList, names: tuple[str, ...], base: Path) -> ImageList:
    """The validation images with the class numbers of training, whose names are given; it may lack classes, but have
    none of its own.

    Raises:
        ValueError: a class of validation is none of training.
    """
    used = [val.class_names[i] for i in np.unique(val.targets)]
    number = {name: i for i, name in enumerate(names)}
    unknown = [name for name in used if name not in number]
    if unknown:
        raise ValueError(
            f"{len(unknown)} class(es) of val below {str(base)!r} are not in train: {few(unknown)}. Classes are "
            "numbered by train's folders: add theirs there, rename them as train's are, or take them out of val"
        )
    missing = [name for name in names if name not in used]
    if missing:
        log.warning("val has no images of %d of the %d classes: %s", len(missing), len(number), few(missing))
    if val.class_names == names:  # a name may be there twice, as "crane" is in ImageNet
        return val
    numbers = np.array([number.get(name, -1) for name in val.class_names], np.int32)
    return dataclasses.replace(val, targets=numbers[val.targets], class_names=names)
