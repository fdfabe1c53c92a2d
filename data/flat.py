"""ImageNet's original validation folder: 50 000 files without class folders, and their classes in a file beside it."""

import codecs
import io
import tarfile
from pathlib import Path

import numpy as np

from data.folder import EXTENSIONS
from data.image_list import ImageList, Names

_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
_DEVKIT = "ILSVRC2012_devkit_t12"
EXPECTED = (
    f"val.txt with lines 'ILSVRC2012_val_00000001.JPEG n01751748' (or the number of the class among the sorted names), "
    f"Kaggle's LOC_val_solution.csv, or {_DEVKIT}.tar.gz"
)


def has_images(folder: Path) -> bool:
    """Whether images lie directly in the folder."""
    return folder.is_dir() and any(_is_image(path) for path in folder.iterdir())


def _is_image(path: Path) -> bool:
    return path.name.lower().encode("utf-8", "surrogateescape").endswith(EXTENSIONS)


def list_flat(base: Path, classes: tuple[str, ...]) -> ImageList:
    """Images of base/val with the classes that a file in `base` gives them.

    Raises:
        ValueError: there is no such file, or it and the folder do not fit together.
    """
    paths = sorted(path for path in (base / "val").iterdir() if _is_image(path))
    labels = read_labels(base, [path.stem for path in paths])
    number = {name: i for i, name in enumerate(classes)}
    targets = []
    for path in paths:
        label = labels.get(path.stem)
        if label is None:
            raise ValueError(f"image {str(path)!r} has no class in the ground truth beside it ({len(labels)} entries)")
        index = number.get(label, int(label) if label.isdecimal() else -1)
        if not 0 <= index < len(classes):
            raise ValueError(f"image {str(path)!r} is of class {label!r}, which has no folder in {base / 'train'}")
        targets.append(index)
    total = sum(path.stat().st_size for path in paths)
    names = Names.pack(path.name.encode("utf-8", "surrogateescape") for path in paths)
    names.prefix = f"{base / 'val'}/"
    return ImageList(names, np.array(targets, np.int32), classes, total)


def read_labels(base: Path, stems: list[str]) -> dict[str, str]:
    """Class (folder name, or number among the sorted names) of every image by its name without extension.

    `stems` are the sorted images: the development kit has one number a line in their order.
    """
    for path in (base / "val.txt", base / "val" / "val.txt", base / "LOC_val_solution.csv"):
        if path.is_file():
            text = path.read_bytes().removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
            rows = [line.replace(",", " ").split() for line in text.split("\n")]
            return {Path(row[0]).stem: row[1] for row in rows if len(row) > 1 and row[0] != "ImageId"}
    truth, meta = _devkit(base)
    if truth is None or meta is None:
        raise ValueError(
            f"{base / 'val'} has images but no class folders, and their classes are missing: put {EXPECTED} in {base}"
        )
    from scipy.io import loadmat  # comes with scikit-learn

    synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
    wnids = {int(synset["ILSVRC2012_ID"]): str(synset["WNID"]) for synset in synsets}
    numbers = [int(line) for line in truth.split()]
    if len(numbers) != len(stems):
        raise ValueError(f"the development kit has {len(numbers)} classes for {len(stems)} images in {base / 'val'}")
    return dict(zip(stems, (wnids[i] for i in numbers)))


def _devkit(base: Path) -> tuple[bytes | None, bytes | None]:
    """Ground truth and meta.mat, from the unpacked development kit or its archive."""
    for folder in (base, base / "data", base / _DEVKIT / "data"):
        truth, meta = folder / _TRUTH, folder / "meta.mat"
        if truth.is_file() and meta.is_file():
            return truth.read_bytes(), meta.read_bytes()
    archive = base / f"{_DEVKIT}.tar.gz"
    if not archive.is_file():
        return None, None
    with tarfile.open(archive) as tar:
        files = [tar.extractfile(f"{_DEVKIT}/data/{name}") for name in (_TRUTH, "meta.mat")]
        truth_bytes, meta_bytes = (file.read() if file else None for file in files)
    return truth_bytes, meta_bytes
