"""Data sets by name. Each is two lists of images in the end: folders of classes, or tar shards."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.demo import demo_root, write_once
from data.flat import has_images, list_flat
from data.folder import list_folder
from data.image_list import ImageList
from data.shards import has_shards, list_shards
from involution.cache import writable_cache_dir

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
        root: its folder, with train/<class>/ and val/<class>/, or shards train-*.tar and val-*.tar. imagenet also takes
            the original flat val/ together with val.txt or the development kit.
        exclude: file with images to leave out, a path relative to `root` a line; without it `root`/excluded.txt counts.

    Raises:
        ValueError: the folder is missing or empty, or the classes of train and val differ.
    """
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
    train = _list(base, "train")
    val = "test" if name == "cifar10" and not (base / "val").exists() else "val"
    flat = name == "imagenet" and has_images(base / val)
    splits = DataSplits(train, list_flat(base, train.class_names) if flat else _list(base, val))
    _check_classes(splits, base)
    excluded = _read_excluded(base / EXCLUDED if exclude is None else Path(exclude), required=exclude is not None)
    return DataSplits(*(_without(images, excluded, base) for images in splits)) if excluded else splits


def _list(base: Path, split: str) -> ImageList:
    if (base / split).exists():
        return list_folder(base / split)
    if has_shards(base, split):
        return list_shards(base, split)
    raise ValueError(f"data folder {str(base)!r} has no folder {split}; expected {base}/{split}/<class>/<image>.jpg")


def _given(root: str | os.PathLike[str] | None) -> Path:
    if not root:
        raise ValueError("this data set needs its folder: set data.root to the folder with train/ and val/")
    return Path(root)


def _imagenette(root: str | os.PathLike[str] | None) -> Path:
    """An existing folder with train/, or torchvision's download (1.5 GB)."""
    base = Path(root) if root else writable_cache_dir() / "imagenette"
    if (base / "train").exists() or has_shards(base, "train"):
        return base

    def download(folder: Path) -> None:
        from torchvision.datasets import Imagenette

        Imagenette(folder, download=True)

    return _downloaded(base / "imagenette2-full", download, "Imagenette") / "imagenette2"


def _cifar10(root: str | os.PathLike[str] | None) -> Path:
    """An existing folder with train/, or torchvision's download as a folder of PNGs."""
    base = Path(root) if root else writable_cache_dir() / "cifar10"
    if (base / "train").exists() or has_shards(base, "train"):
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


def _check_classes(splits: DataSplits, base: Path) -> None:
    """Class numbers come from sorted names, so a missing folder would shift all that follow."""
    train, val = set(splits.train.class_names), set(splits.val.class_names)
    if train == val:
        return
    parts = [
        f"{len(names)} only in {split}: {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}"
        for split, names in (("train", train - val), ("val", val - train))
        if names
    ]
    raise ValueError(f"class folders of train and val below {str(base)!r} differ ({'; '.join(parts)}); make them equal")


def _read_excluded(path: Path, required: bool) -> set[bytes]:
    """Paths of an exclusion list: one a line, then optionally a tab and the reason; # starts a comment."""
    if not required and not path.is_file():
        return set()
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ValueError(f"exclusion list {str(path)!r} cannot be read: {error.strerror}") from None
    names = {line.split(b"\t")[0].strip() for line in lines if not line.startswith(b"#")} - {b""}
    return {name.replace(b"\\n", b"\n") for name in names}


def _without(images: ImageList, excluded: set[bytes], base: Path) -> ImageList:
    inside = os.fsencode(os.path.relpath(images.paths.prefix, base)) + b"/"
    here = {name[len(inside) :] for name in excluded if name.startswith(inside)}
    keep = np.flatnonzero([images.paths.raw(i) not in here for i in range(len(images))]) if here else None
    if keep is None or len(keep) == len(images):
        return images
    left = images.select(keep)
    gone = np.setdiff1d(images.targets, left.targets)
    if len(gone):
        names = ", ".join(images.class_names[i] for i in gone[:5])
        raise ValueError(f"the exclusion list of {str(base)!r} leaves no images of class {names}; repair or add some")
    return left
