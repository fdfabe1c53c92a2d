"""Data sets by name. Each is two image folders in the end."""

import os
from pathlib import Path
from typing import NamedTuple

from data.demo import demo_root
from data.folder import list_folder
from data.image_list import ImageList

NAMES = ("demo", "imagenet", "imagenette", "cifar10", "folder")


class DataSplits(NamedTuple):
    train: ImageList
    val: ImageList


def open_dataset(name: str, root: str | os.PathLike[str] | None = None) -> DataSplits:
    """Lists a data set's images.

    Args:
        name: one of demo, imagenet, imagenette, cifar10, folder.
        root: its folder, with train/<class> and val/<class>. demo needs none.

    Raises:
        ValueError: the folder is missing or empty, or the classes of train and val differ.
    """
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}; expected one of {', '.join(NAMES)}")
    if name == "demo":
        base = demo_root(root)
    elif not root:
        raise ValueError(f"data set {name!r} needs its folder: set data.root")
    else:
        base = Path(root)
    if not base.is_dir():
        raise ValueError(f"data folder {str(base)!r} does not exist; set data.root to the folder with train/ and val/")
    val = "test" if name == "cifar10" and not (base / "val").exists() else "val"
    splits = DataSplits(list_folder(base / "train"), list_folder(base / val))
    _check_classes(splits, base)
    return splits


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
