"""A list of images that stays small: 1.28 million files take about 60 MB."""

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from data.decode import BadImageError
from involution.outage import patiently

NO_FILE = "it is a pipe, a socket or a device, no file"


def read_file(path: str) -> bytes:
    """The bytes of a file of a data set.

    Raises:
        BadImageError: it cannot be read, or is no file.
    """

    def read() -> bytes:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BadImageError(path, NO_FILE)
            return file.read()

    try:
        return patiently(read)
    except OSError as error:
        raise BadImageError(path, error.strerror or str(error), lost=True) from error


def read_span(path: str, offset: int, size: int) -> bytes:
    """A part of a file; an outage of the disk or network is waited for, as in `read_file`."""

    def read() -> bytes:
        with open(path, "rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    return patiently(read)


def _without_waiting(path: str, flags: int) -> int:
    """Opens a pipe that nobody writes to at once; files are read as ever."""
    return os.open(path, flags | os.O_NONBLOCK)


class Names(Sequence[str]):
    """Immutable sequence of file names, kept as one block of bytes and offsets.

    A Python list of 1.28 M strings takes 130 MB, and every worker process that touches them copies it.
    """

    def __init__(self, block: np.ndarray, offsets: np.ndarray, prefix: str = "") -> None:
        self.block, self.offsets, self.prefix = block, offsets, prefix

    @classmethod
    def pack(cls, names: Iterable[bytes]) -> "Names":
        names = list(names)
        offsets = np.zeros(len(names) + 1, np.int64)
        np.cumsum([len(name) for name in names], out=offsets[1:])
        return cls(np.frombuffer(b"".join(names), np.uint8), offsets)

    @classmethod
    def join(cls, parts: Sequence["Names"]) -> "Names":
        lengths = [np.diff(part.offsets) for part in parts]
        offsets = np.concatenate([np.zeros(1, np.int64), *lengths])
        return cls(np.concatenate([part.block for part in parts]), np.cumsum(offsets, out=offsets))

    def raw(self, index: int) -> bytes:
        """Without the prefix, as the file system spells it."""
        return self.block[self.offsets[index] : self.offsets[index + 1]].tobytes()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.prefix + os.fsdecode(self.raw(index % len(self)))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


@dataclass(frozen=True)
class ImageList:
    """Images of one split.

    Attributes:
        paths: full path of every image (for shards the path of "shard.tar/member", for messages only).
        targets: (n,) int32 class indices.
        class_names: name of every class, sorted.
        total_bytes: size of all files.
        shards: paths of tar shards; empty when the images are files of their own.
        spans: (n, 3) int64 shard, offset and size of every image in shards; (0, 3) otherwise.
    """

    paths: Names
    targets: np.ndarray
    class_names: tuple[str, ...]
    total_bytes: int = 0
    shards: tuple[str, ...] = ()
    spans: np.ndarray = field(default_factory=lambda: np.zeros((0, 3), np.int64))

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> bytes:
        """Encoded bytes of an image.

        Raises:
            BadImageError: the file cannot be read.
        """
        if not self.shards:
            return read_file(self.paths[index])
        shard, offset, size = (int(number) for number in self.spans[index])
        try:
            return read_span(self.shards[shard], offset, size)
        except OSError as error:
            raise BadImageError(self.paths[index], error.strerror or str(error), lost=True) from error

    def select(self, keep: np.ndarray) -> "ImageList":
        """The images at the sorted indices `keep`; class names stay."""
        names = Names.pack(self.paths.raw(int(i)) for i in keep)
        names.prefix = self.paths.prefix
        spans = self.spans[keep] if self.shards else self.spans
        return replace(self, paths=names, targets=self.targets[keep], spans=spans)

    @property
    def fingerprint(self) -> dict[str, int | str]:
        """Counts, total size and a hash over names, classes and order: equal on all ranks and after a resume."""
        digest = hashlib.sha256()
        for part in (self.paths.block, self.paths.offsets, self.targets):
            digest.update(np.ascontiguousarray(part).data)
        digest.update("\0".join(self.class_names).encode("utf-8", "surrogateescape"))
        return {
            "images": len(self),
            "classes": len(self.class_names),
            "bytes": self.total_bytes,
            "sha256": digest.hexdigest(),
        }
