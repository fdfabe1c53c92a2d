"""Lists of images to leave out: a path below the data set's folder a line, then optionally a tab and the reason.

scripts/check_dataset.py writes them, people edit them. A line may be meant in several ways (what follows a tab or a #
may be a remark or a part of the name, a path may be absolute or begin with ./), and counts in every way that is an
image of the data set. What is none in any way is reported.
"""

import codecs
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data.image_list import ImageList

log = logging.getLogger("involution.data")

HEADER = "# images that cannot be read, written by scripts/check_dataset.py: path, tab, reason"
_ESCAPES = {b"\\": b"\\\\", b"\n": b"\\n", b"\t": b"\\t", b"\r": b"\\r"}


def line(path: bytes, reason: str) -> bytes:
    """A line of the list, without its end. Backslashes, tabs and line ends of the name are escaped."""
    escaped = b"".join(_ESCAPES.get(bytes([byte]), bytes([byte])) for byte in path)
    return escaped + b"\t" + " ".join(reason.split()).encode("utf-8", "backslashreplace")


def _unescaped(name: bytes) -> bytes:
    pairs = {escaped[1:]: byte for byte, escaped in _ESCAPES.items()}
    parts, position = [], 0
    while (found := name.find(b"\\", position)) >= 0:
        following = name[found + 1 : found + 2]
        parts += [name[position:found], pairs.get(following, b"\\" + following)]
        position = found + 2
    return b"".join([*parts, name[position:]])


class Exclusions:
    """The lines of a list, with the paths that each may mean.

    Raises:
        ValueError: the file cannot be read.
    """

    def __init__(self, path: Path, base: Path) -> None:
        self.path, self.base = path, base
        self.bases = {os.fsencode(base), os.fsencode(os.path.realpath(base))}
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ValueError(f"exclusion list {str(path)!r} cannot be read: {error.strerror}") from None
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # as PowerShell's > writes it
            content = content.decode("utf-16").encode()
        lines = content.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").split(b"\n")
        self.lines = [text for text in lines if text.strip() and not text.lstrip().startswith(b"#")]
        self.meant = {name: i for i, text in enumerate(self.lines) for name in self._meanings(text)}
        self.matched: set[int] = set()

    def _meanings(self, text: bytes) -> Iterator[bytes]:
        """Paths below the base."""
        texts = {
            text,
            text.split(b"\t")[0],
            text.partition(b" #")[0],
            text.partition(b"#")[0],
            text.partition(b"\t#")[0],
        }
        stripped = {each.strip() for each in texts}
        for name in texts | stripped | {each.strip(b"\"'") for each in stripped}:
            for path in {name, _unescaped(name), name.replace(b"\\", b"/")} if b"\\" in name else {name}:
                yield path
                if path.startswith((b".", b"/")) or b"//" in path or b"/." in path:
                    yield from (os.path.relpath(os.path.join(base, path), base) for base in self.bases)

    def without(self, images: ImageList) -> ImageList:
        """The images that the list leaves.

        Raises:
            ValueError: it leaves none of a class.
        """
        inside = os.path.relpath(os.fsencode(images.paths.prefix), os.fsencode(self.base)) + b"/"
        inside = b"" if inside == b"./" else inside  # shards lie in the base itself
        keep = []
        for i in range(len(images)):
            entry = self.meant.get(inside + images.paths.raw(i))
            if entry is None:
                keep.append(i)
            else:
                self.matched.add(entry)
        if len(keep) == len(images):
            return images
        left = images.select(np.array(keep, int))
        gone = np.setdiff1d(images.targets, left.targets)
        if len(gone):
            names = ", ".join(images.class_names[i] for i in gone[:5])
            raise ValueError(
                f"the exclusion list {str(self.path)!r} leaves no images of class {names}; repair or add some"
            )
        return left

    def report(self) -> None:
        """Say which lines are no image of the data set, after all its lists have been through `without`."""
        odd = [os.fsdecode(text) for i, text in enumerate(self.lines) if i not in self.matched]
        if odd:
            log.warning(
                "%d of %d entries of the exclusion list %s are no image of the data set: %s",
                len(odd), len(self.lines), self.path, ", ".join(map(repr, odd[:5])) + (", ..." if odd[5:] else ""),
            )  # fmt: skip
