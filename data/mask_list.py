"""Pictures with a class for every pixel: pairs of files, whose masks hold one value a pixel.

Shapes: H x W pixels; N classes.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from data.decode import BadImageError, decode, upright_size
from data.folder import EXTENSIONS
from data.image_list import NO_FILE, Names, read_file

IGNORED = 255  # the class of pixels that count neither for nor against a model
FOREIGN = 254  # in `MaskList.classes`: no value of a mask
LABEL_MODES = ("L", "1", "I", "I;16")  # Pillow's, of one number a pixel


class BadMaskError(BadImageError):
    """A mask that holds what it should not."""

    def __str__(self) -> str:
        return f"mask {self.path!r} {self.reason}"


@dataclass(frozen=True)
class MaskList:
    """Pairs of one split, sorted by the pictures' paths.

    Attributes:
        images, masks: paths, pair by pair.
        class_names: N of them.
        colours: (N, 3) uint8, to draw classes with.
        classes: (256,) uint8: the value of a pixel in a mask -> its class, IGNORED or FOREIGN.
        values: (N,) uint8: class -> the value that the benchmark wants for it.
    """

    images: Names
    masks: Names
    class_names: tuple[str, ...]
    colours: np.ndarray
    classes: np.ndarray
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Image.Image, np.ndarray]:
        """The picture, and the classes of its pixels (H, W) uint8.

        Raises:
            BadImageError: a file cannot be read, or the mask has a value that is no class's; the file is named.
        """
        picture, path = self.images[index], self.masks[index]
        data = read_file(path)
        try:
            with Image.open(io.BytesIO(data)) as mask:
                values = np.asarray(mask).astype(np.int64)
        except Exception as error:  # Pillow's plugins raise almost every type
            raise BadMaskError(path, f"cannot be read: {error or type(error).__name__}") from error
        classes = self.classes[values.clip(0, 255)]
        foreign = values[(classes == FOREIGN) | (values < 0) | (values > 255)]
        if len(foreign):
            found = ", ".join(map(str, np.unique(foreign)[:5].tolist()))
            known = np.flatnonzero(self.classes != FOREIGN)
            raise BadMaskError(path, f"has the value {found}, which is no label ({_ranges(known)} are)")
        image = decode(read_file(picture), picture, annotated=(values.shape[1], values.shape[0]))
        if values.shape != (image.height, image.width):
            raise BadMaskError(path, _other_size(values.shape[::-1], image.size))
        return image, classes

    def select(self, keep: Sequence[int]) -> "MaskList":
        """The pairs at the indices `keep`."""
        images, masks = (Names.pack(os.fsencode(paths[int(i)]) for i in keep) for paths in (self.images, self.masks))
        return MaskList(images, masks, self.class_names, self.colours, self.classes, self.values)

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """Counts and a hash over names, classes and order: equal on all ranks and after a resume."""
        digest = hashlib.sha256()
        common = os.path.commonpath([*self.images[:1], *self.masks[:1]]) if len(self) else ""
        for path in (*self.images, *self.masks):
            digest.update(os.fsencode(os.path.relpath(path, common)) + b"\0")
        digest.update("\0".join(self.class_names).encode() + self.classes.tobytes())
        return {"images": len(self), "classes": len(self.class_names), "sha256": digest.hexdigest()}


def pairs(images: Sequence[Path], masks: Sequence[Path], on_error: str = "stop") -> tuple[Names, Names]:
    """The paths of pictures and their masks, after a look at the first bytes of each. A picture may be as large as its
    mask only when turned as its Exif orientation says.

    Args:
        on_error: with "skip", files that cannot be read are left for the loader to skip and count.

    Raises:
        ValueError: a picture and its mask have other sizes, or a mask holds colours.
    """
    with ThreadPoolExecutor(16) as pool:  # threads hide the latency of network storage
        for problem in pool.map(lambda image, mask: _problem(image, mask, on_error), images, masks):
            if problem is not None:
                raise ValueError(problem)
    return Names.pack(map(os.fsencode, images)), Names.pack(map(os.fsencode, masks))


def _problem(image: Path, mask: Path, on_error: str) -> str | None:
    try:
        if any(path.exists() and not path.is_file() for path in (image, mask)):
            raise ValueError(NO_FILE)
        with Image.open(image) as picture, Image.open(mask) as labels:
            if labels.mode not in LABEL_MODES:
                kind = "a palette" if labels.mode == "P" else f"colours ({labels.mode})"
                return f"mask {str(mask)!r} has {kind}; it should have one channel, whose values are the labels"
            fits = labels.size == picture.size or labels.size == upright_size(picture)  # which may unpack it
            return None if fits else f"mask {str(mask)!r} {_other_size(labels.size, picture.size)}"
    except Exception as error:  # Pillow's plugins raise almost every type
        if on_error == "skip":
            return None
        return f"{str(image)!r} or its mask cannot be read: {error or type(error).__name__}"


def _other_size(mask: Sequence[int], image: Sequence[int]) -> str:
    return f"has {mask[0]} x {mask[1]} pixels, its image {image[0]} x {image[1]}; they should be equal"


def _ranges(numbers: np.ndarray) -> str:
    """0, 1, 2, 5 -> "0-2, 5"."""
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) > 1) + 1)
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def partners(images: Sequence[Path], wanted: Sequence[Sequence[Path]], where: Path) -> list[Path]:
    """For each picture the first of its candidates for a mask that every picture has.

    Raises:
        ValueError: there are pictures without; the first ones are named.
    """
    complete = [list(masks) for masks in zip(*wanted) if all(mask.is_file() for mask in masks)]
    if complete:
        return complete[0]
    lacking = [image for image, masks in zip(images, wanted) if not any(mask.is_file() for mask in masks)]
    lacking = lacking or list(images)  # some have one kind, some another
    shown = ", ".join(path.name for path in lacking[:3]) + (", ..." if len(lacking) > 3 else "")
    place = " or ".join(mask.name for mask in wanted[images.index(lacking[0])])
    raise ValueError(
        f"{len(lacking)} of {len(images)} pictures have no mask in {str(where)!r}: {shown}; expected {place}"
    )


def palette(count: int) -> np.ndarray:
    """(count, 3) colours that are easy to tell apart: PASCAL VOC's, whose bits count through the classes."""
    numbers = np.arange(count)
    colours = np.zeros((count, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * bit + channel)) & 1).astype(np.uint8) << (7 - bit)
    return colours


def open_folder(
    root: str | os.PathLike[str] | None, class_names: Sequence[str] | None, on_error: str = "stop"
) -> tuple[MaskList, MaskList]:
    """Any folder with train/images/, train/masks/, val/images/, val/masks/: `a.jpg` belongs to `a.png`.

    Masks hold 0 for the first class, 1 for the second, ..., and 255 for pixels that do not count.

    Raises:
        ValueError: a folder or a mask is missing, or does not fit.
    """
    train, val = (open_split(root, class_names, split, on_error) for split in ("train", "val"))
    _check_not_black_and_white(train)
    return train, val


def open_split(
    root: str | os.PathLike[str] | None, class_names: Sequence[str] | None, split: str, on_error: str = "stop"
) -> MaskList:
    """One split of `open_folder`; the same errors."""
    if not root or not Path(root).is_dir():
        raise ValueError(f"data folder {str(root)!r} does not exist; set data.root to the folder with train/ and val/")
    if not class_names:
        raise ValueError("data.classes is not set; give the names of the values 0, 1, ...: data.classes=[road,car]")
    n = len(class_names)
    if n >= FOREIGN or len(set(class_names)) < n:
        raise ValueError(f"data.classes has {n} names; they should differ, and be fewer than {FOREIGN}")
    classes = np.full(256, FOREIGN, np.uint8)
    classes[:n], classes[IGNORED] = np.arange(n), IGNORED
    folder = Path(os.path.abspath(root)) / split
    endings = tuple(ending.decode() for ending in EXTENSIONS)
    images = sorted(path for path in (folder / "images").rglob("*") if path.name.lower().endswith(endings))
    if not images:
        raise ValueError(
            f"{str(folder / 'images')!r} has no pictures; expected {split}/images/*.jpg and {split}/masks/*.png"
        )
    within = [(folder / "masks" / path.relative_to(folder / "images")).with_suffix(".png") for path in images]
    found = pairs(images, partners(images, [[path] for path in within], folder / "masks"), on_error)
    return MaskList(*found, tuple(class_names), palette(n + 1)[1:], classes, np.arange(n, dtype=np.uint8))


def _check_not_black_and_white(masks: MaskList) -> None:
    """Refuse masks of 0 and 255 alone: everything but the first class would not count, and every model be perfect.

    Raises:
        ValueError: no mask has another value.
    """
    values: set[int] = set()
    for path in masks.masks:  # the first few tell, unless it is so
        with suppress(Exception), Image.open(path) as mask:  # the loader will say so, or skip it
            values |= set(np.unique(np.asarray(mask)).tolist())
        if values - {0, IGNORED}:
            return
    if len(masks.class_names) > 1 and values == {0, IGNORED}:
        raise ValueError(
            f"the masks of {str(Path(masks.masks[0]).parent)!r} hold 0 and 255 alone, and 255 is for pixels that "
            f"do not count: write 1 for {masks.class_names[1]!r}, the second of data.classes"
        )
