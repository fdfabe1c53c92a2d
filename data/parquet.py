"""Parquet files as Hugging Face writes them: <split>-*.parquet with the columns image {bytes, path} and label.

Images are read by position, so both loaders keep the exact global order of data/sampling.py. When a file is opened for
the first time it is read through, and the place of every picture in it is kept (data/parquet_pages.py): from then on a
picture costs one read of itself and the 64 KiB around it, not the decoding of a hundred neighbours.
"""

import dataclasses
import functools
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data import parquet_pages
from data.decode import BadImageError
from data.folder import cache_file, load_arrays, save_arrays
from data.image_list import NO_FILE, ImageList, Names, read_span
from data.shards import CLASSES, class_names
from involution.outage import patiently

log = logging.getLogger("involution.data")

SPLITS = {"train": ("train",), "val": ("val", "validation"), "test": ("test",)}  # our names, theirs
EXPECTED = "expected image {bytes, path} and label (whole numbers), as Hugging Face's image data sets have them"
_BYTES, _PATH = "image.bytes", "image.path"


def parquet_files(base: Path, split: str) -> list[Path]:
    """The files of a split in base/ or, as in a clone from the Hub, in base/data/; sorted."""
    for folder in (base, base / "data"):
        found = sorted(path for name in SPLITS[split] for path in folder.glob(f"{name}-*.parquet"))
        if found:
            return found
    return []


@dataclasses.dataclass(frozen=True)
class ParquetList(ImageList):
    """Images in parquet files, which are the `shards`.

    Attributes:
        spans: (n, 8) int64: the file, then a data.parquet_pages.Place (offset counted from the file's beginning), then
            row group and row in it.
    """

    def read(self, index: int) -> bytes:
        """See ImageList; a picture without a place takes decoding its row group."""
        file, *numbers, group, row = self.spans[index].tolist()
        place = parquet_pages.Place(*numbers)
        try:
            if place.stored:
                return parquet_pages.cut(read_span(self.shards[file], place.offset, place.stored), place)
            data: bytes | None = patiently(lambda: _group(self.shards[file], group))[row].as_py()
        except (OSError, ValueError) as error:  # pyarrow's exceptions are among them
            reason = getattr(error, "strerror", None) or str(error)
            raise BadImageError(self.paths[index], reason, lost=isinstance(error, OSError)) from error
        if data is None:
            raise BadImageError(self.paths[index], "the row has no bytes, at most a path")
        return data


def list_parquet(base: Path, split: str) -> ParquetList:
    """All images of a split, whose files are read through when that has not been done since they last changed.

    Classes are named by base/classes.txt, as those of shards are, or by Hugging Face's description of the columns.

    Raises:
        ValueError: pyarrow is missing, a file is damaged, has other columns, or labels that are no classes.
    """
    files = parquet_files(base, split)
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ValueError(f"{str(files[0])!r} is a parquet file, which needs pyarrow: pip install pyarrow") from None
    known = [_label_names(path) for path in files]
    turn = os.getpid() % len(files)  # ranks begin with different files, and find what the others have finished
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(_places, files[turn:] + files[:turn]))
    parts = parts[len(files) - turn :] + parts[: len(files) - turn]
    targets = np.concatenate([part["targets"] for part in parts])
    numbers = np.repeat(np.arange(len(files)), [len(part["targets"]) for part in parts])
    spans = np.column_stack([numbers, np.concatenate([part["spans"] for part in parts])])
    if not len(targets):
        raise ValueError(f"{str(files[0])!r} and the {len(files) - 1} parquet files beside it have no images")
    without = int((spans[:, 2] == 0).sum())
    if without:
        log.warning(
            "%d of %d images in %s: reading one takes decoding all of its row group, for the pages are compressed or "
            "laid out in an unusual way; pack them with scripts/pack_dataset.py",
            without, len(targets), files[0].parent,
        )  # fmt: skip
    names = Names.join([Names(part["block"], part["offsets"]) for part in parts])
    names.prefix = f"{files[0].parent}/"
    size = sum(path.stat().st_size for path in files)
    at_least = int(targets.max()) + 1
    classes = class_names(base, at_least) if known[0] is None or (base / CLASSES).is_file() else known[0]
    if len(classes) < at_least:
        raise ValueError(f"{str(files[0])!r} names {len(classes)} classes, but its labels go up to {at_least - 1}")
    return ParquetList(names, targets, classes, size, tuple(map(str, files)), spans)


def _label_names(path: Path) -> tuple[str, ...] | None:
    """The classes by Hugging Face's description of the columns, None where there is none.

    Raises:
        ValueError: the file is damaged or has other columns.
    """
    import pyarrow

    schema = _opened(path).schema_arrow
    try:
        image = schema.field("image").type
        data, label = image.field("bytes").type, schema.field("label").type
        fit = pyarrow.types.is_integer(label) and (pyarrow.types.is_binary(data) or pyarrow.types.is_large_binary(data))
    except (KeyError, AttributeError):
        fit = False
    if not fit:
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        raise ValueError(f"parquet file {str(path)!r} has the columns {columns}; {EXPECTED}")
    try:
        names = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]["label"]["names"]
    except (KeyError, ValueError, TypeError):
        return None
    return tuple(map(str, names)) if isinstance(names, list) else None


def _opened(path: Path | str, metadata: Any = None) -> Any:
    """A pyarrow.parquet.ParquetFile, which two threads must not share.

    Raises:
        ValueError: it cannot be opened.
    """
    import pyarrow.parquet

    if not Path(path).is_file():
        raise ValueError(f"parquet file {str(path)!r} cannot be read: {NO_FILE}")
    try:
        return pyarrow.parquet.ParquetFile(path, metadata=metadata)
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path | str, error: Exception) -> ValueError:
    return ValueError(
        f"parquet file {str(path)!r} cannot be read: {' '.join(str(error).split())}; download it again (where it has a "
        "few hundred bytes only, it points to a file in Git LFS: git lfs pull)"
    )


@functools.lru_cache(512)
def _metadata(path: str) -> Any:
    return _opened(path).metadata


@functools.lru_cache(2)  # an evaluation reads neighbours one after the other; in a shuffled epoch none is met again
def _group(path: str, group: int) -> Any:
    """The pictures of a row group; `use_threads` would start threads in forked workers."""
    table = _opened(path, _metadata(path)).read_row_group(group, [_BYTES], use_threads=False)
    return table.column("image").combine_chunks().field("bytes")


def _places(path: Path) -> dict[str, np.ndarray]:
    """Names, classes and places of a file's images: from the cache, or read through."""
    status = path.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns], np.int64)
    cache = cache_file(path)
    stored = load_arrays(cache)
    if stored is None or not np.array_equal(stored["stamp"], stamp):
        log.info("reading through %s (%.0f MB), once", path, status.st_size / 1e6)
        try:
            stored = _read_through(path) | {"stamp": stamp}
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from None
        save_arrays(cache, stored)
    if len(stored["targets"]) and (lowest := int(stored["targets"].min())) < 0:
        raise ValueError(f"parquet file {str(path)!r} has rows of label {lowest}, which is no class; leave it out")
    return stored


def _read_through(path: Path) -> dict[str, np.ndarray]:
    file = _opened(path)
    names: list[bytes] = []
    targets: list[int] = []
    spans: list[tuple[int, ...]] = []
    with open(path, "rb", buffering=0) as raw:
        for group in range(file.num_row_groups):
            row_group = file.metadata.row_group(group)
            chunks = {(c := row_group.column(i)).path_in_schema: c for i in range(row_group.num_columns)}
            table = file.read_row_group(group, [*(name for name in (_BYTES, _PATH) if name in chunks), "label"])
            images = table.column("image").combine_chunks()
            begin = chunks[_BYTES].data_page_offset
            if chunks[_BYTES].has_dictionary_page:
                begin = min(begin, chunks[_BYTES].dictionary_page_offset)
            stored = os.pread(raw.fileno(), chunks[_BYTES].total_compressed_size, begin)
            places = parquet_pages.places(stored, chunks[_BYTES].compression, images.field("bytes").to_pylist())
            for row, (place, label) in enumerate(zip(places, table.column("label").to_pylist(), strict=True)):
                spans.append((begin + place.offset, *place[1:], group, row))
                targets.append(-1 if label is None else label)
            paths = images.field("path").to_pylist() if _PATH in chunks else [None] * len(places)
            names += [_name(path, len(names) + i, name) for i, name in enumerate(paths)]
    packed = Names.pack(names)
    return {
        "block": packed.block,
        "offsets": packed.offsets,
        "targets": np.array(targets, np.int32),
        "spans": np.array(spans, np.int64).reshape(-1, 7),
    }


def _name(path: Path, row: int, name: str | None) -> bytes:
    """<file>/<row>, and the picture's own name where it has one."""
    own = f"-{name.rpartition('/')[2]}" if name else ""
    return f"{path.name}/{row:06d}{own}".encode("utf-8", "surrogateescape")
