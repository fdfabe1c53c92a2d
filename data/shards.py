"""Tar shards in WebDataset form: <split>-000000.tar, ... with members <key>.jpg (or another image) and <key>.cls.

Images are read from their place in a shard (one `pread` each), so both loaders keep the exact global order of
data/sampling.py; a sequential reader would have to settle for shuffling shards and a buffer. What this saves is a
million inodes, and the metadata requests that make network storage slow.
"""

import codecs
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.folder import EXTENSIONS, cache_file, load_arrays, save_arrays
from data.image_list import NO_FILE, ImageList, Names

CLASSES = "classes.txt"  # a class name a line, in the order of the numbers in the .cls members


def has_shards(base: Path, split: str) -> bool:
    return base.is_dir() and any(base.glob(f"{split}-*.tar"))


def list_shards(base: Path, split: str) -> ImageList:
    """All images of base/<split>-*.tar; the places of the members are cached until a shard changes.

    Raises:
        ValueError: a shard is damaged or has an image without a class.
    """
    shards = sorted(base.glob(f"{split}-*.tar"))
    cache = cache_file(base / f"{split}.shards")
    for path in shards:
        if not path.is_file():
            raise ValueError(f"shard {str(path)!r} cannot be read: {NO_FILE}")
    stamp = np.array([[path.stat().st_size, path.stat().st_mtime_ns] for path in shards], np.int64)
    stored = load_arrays(cache)
    if stored is None or not np.array_equal(stored["stamp"], stamp):
        stored = _index(shards) | {"stamp": stamp}
        save_arrays(cache, stored)
    names = Names(stored["block"], stored["offsets"], f"{base}/")
    targets, spans = stored["targets"], stored["spans"]
    if not len(targets):
        raise ValueError(f"the shards {base}/{split}-*.tar have no images")
    classes = class_names(base, int(targets.max()) + 1)
    return ImageList(names, targets, classes, int(spans[:, 2].sum()), tuple(str(path) for path in shards), spans)


def class_names(base: Path, at_least: int) -> tuple[str, ...]:
    """Those of base/classes.txt, or else numbers.

    Raises:
        ValueError: the file has fewer than `at_least`.
    """
    path = base / CLASSES
    if not path.is_file():
        return tuple(str(i) for i in range(at_least))
    lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")  # str.splitlines would split at U+2028 too
    names = tuple(line.removesuffix(b"\r").decode("utf-8", "surrogateescape") for line in lines)
    names = names[:-1] if names[-1] == "" else names
    if len(names) < at_least:
        raise ValueError(f"{path} names {len(names)} classes, but the images use {at_least}")
    return names


def _index(shards: list[Path]) -> dict[str, np.ndarray]:
    """Reads the headers of all members."""
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(_members, shards))
    names = Names.pack(name for part in parts for name, _, _, _ in part)
    spans = [(shard, offset, size) for shard, part in enumerate(parts) for _, offset, size, _ in part]
    return {
        "block": names.block,
        "offsets": names.offsets,
        "spans": np.array(spans, np.int64).reshape(-1, 3),
        "targets": np.array([target for part in parts for *_, target in part], np.int32),
    }


def _members(shard: Path) -> list[tuple[bytes, int, int, int]]:
    """(shard/member, offset, size, class) of every image of a shard, in the order of the shard."""
    images: list[tuple[str, str, int, int]] = []
    classes: dict[str, int] = {}
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                folder, _, file = member.name.rpartition("/")
                key = f"{folder}/{file.partition('.')[0]}"
                if member.isfile() and member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    classes[key] = int(content.read()) if content else -1
                elif member.isfile() and member.name.lower().encode("utf-8", "surrogateescape").endswith(EXTENSIONS):
                    images.append((key, member.name, member.offset_data, member.size))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise ValueError(f"shard {str(shard)!r} cannot be read: {error}; write or copy it again") from None
    missing = [name for key, name, _, _ in images if classes.get(key, -1) < 0]
    if missing:
        raise ValueError(
            f"shard {str(shard)!r}: image {missing[0]!r} has no class (a member of the same name with .cls)"
        )
    prefix = shard.name + "/"
    return [
        ((prefix + name).encode("utf-8", "surrogateescape"), offset, size, classes[key])
        for key, name, offset, size in images
    ]
