"""Listing of an image folder (root/<class>/**/<image>) with a cache on disk.

The order is torchvision's ImageFolder: classes sorted by name, then folders, then files.
"""

import contextlib
import hashlib
import json
import os
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.image_list import NO_FILE, ImageList, Names
from involution.cache import cache_dir
from involution.outage import wait_for_lock

EXTENSIONS = (b".jpg", b".jpeg", b".png", b".ppm", b".bmp", b".pgm", b".tif", b".tiff", b".webp")  # torchvision's
_SETTLED = 2_000_000_000  # ns a folder must have been left alone before its listing is worth keeping


def cache_file(root: Path) -> Path:
    """Where the listing of an absolute path is cached."""
    return cache_dir() / "lists" / (hashlib.sha256(os.fsencode(root)).hexdigest()[:24] + ".npz")


def class_folders(root: Path) -> list[str]:
    """Names of the class folders of `root`, sorted.

    Raises:
        ValueError: `root` is missing, cannot be read or has no folders.
    """
    try:
        with os.scandir(root) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except FileNotFoundError:
        raise ValueError(f"data folder {str(root)!r} does not exist; set data.root to the data set's folder") from None
    except OSError as error:
        raise ValueError(f"data folder {str(root)!r} cannot be read: {error.strerror}; check data.root") from None
    if not names:
        raise ValueError(f"data folder {str(root)!r} has no class folders; expected {root}/<class>/<image>.jpg")
    return names


def list_folder(root: Path, may_be_empty: bool = False) -> ImageList:
    """All images under root/<class>/, from the cache when no folder has changed since it was written.

    Raises:
        ValueError: the root or a class folder is missing, unreadable or has no images (`may_be_empty`: all have none).
    """
    root = Path(os.path.abspath(root))
    classes = class_folders(root)
    cache = cache_file(root)
    images = _load(cache, root, classes)
    if images is None:
        with _turn(cache):  # of many ranks one asks a file server for a million sizes, the others find what it noted
            images = _load(cache, root, classes)
            images = _scan(root, classes, cache) if images is None else images
    counts = np.bincount(images.targets, minlength=len(classes))
    if not (counts.any() if may_be_empty else counts.all()):
        empty = [classes[i] for i in np.flatnonzero(counts == 0)]
        shown = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        kinds = " ".join(extension.decode() for extension in EXTENSIONS)
        raise ValueError(
            f"{len(empty)} class folder(s) of {str(root)!r} have no images ({kinds}): {shown}; fill them, "
            "or remove them here and in val"
        )
    return images


@contextlib.contextmanager
def _turn(cache: Path) -> Iterator[None]:
    """While nobody else makes this listing; without waiting where the cache cannot be written."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        lock = open(cache.with_suffix(".lock"), "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with lock:
        wait_for_lock(lock)
        yield


def _walk(folder: bytes, inside: bytes) -> tuple[list[bytes], list[tuple[bytes, int]], int]:
    """Image names below a folder (relative, starting with `inside`), folders and their mtimes, total size."""
    names: list[bytes] = []
    folders: list[bytes] = []
    sizes = 0
    stamps = [(inside, os.stat(folder).st_mtime_ns)]
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.lower().endswith(EXTENSIONS) and not entry.is_dir():
                names.append(inside + b"/" + entry.name)
                with contextlib.suppress(OSError):  # a dangling link: named when it is loaded or scanned
                    sizes += _size(entry)
            elif entry.is_dir():
                folders.append(entry.name)
    names.sort()
    for name in sorted(folders):
        below = _walk(folder + b"/" + name, inside + b"/" + name)
        names += below[0]
        stamps += below[1]
        sizes += below[2]
    return names, stamps, sizes


def _size(entry: os.DirEntry[bytes]) -> int:
    status = entry.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{os.fsdecode(entry.path)!r} cannot be read as an image: {NO_FILE}; remove it")
    return status.st_size


def _class(base: bytes, name: bytes) -> tuple[Names, list[tuple[bytes, int]], int]:
    """`_walk` of a class folder, with the names packed at once: a million Python strings would take 100 MB."""
    names, stamps, total = _walk(base + b"/" + name, name)
    return Names.pack(names), stamps, total


def _scan(root: Path, classes: list[str], cache: Path) -> ImageList:
    started = time.time_ns()
    base = os.fsencode(root)
    try:
        with ThreadPoolExecutor(16) as pool:  # threads hide the latency of network storage
            parts = list(pool.map(lambda name: _class(base, os.fsencode(name)), classes))
    except OSError as error:
        raise ValueError(f"folder {error.filename!r} cannot be read: {error.strerror}") from None
    names = Names.join([part[0] for part in parts])
    targets = np.repeat(np.arange(len(classes), dtype=np.int32), [len(part[0]) for part in parts])
    stamps = [stamp for part in parts for stamp in part[1]]
    total = sum(part[2] for part in parts)
    if all(mtime < started - _SETTLED for _, mtime in stamps):
        folders = json.dumps([[os.fsdecode(name), mtime] for name, mtime in stamps])
        arrays = {"block": names.block, "offsets": names.offsets, "targets": targets, "bytes": np.array(total)}
        save_arrays(cache, arrays | {"folders": np.frombuffer(folders.encode(), np.uint8)})
    names.prefix = f"{root}/"
    return ImageList(names, targets, tuple(classes), total)


def save_arrays(cache: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes whole or not at all; several ranks may do so at once. A full or read-only disk only costs time."""
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        temporary = cache.with_name(f".{uuid.uuid4().hex}.npz")  # mkstemp's would be for this user alone
        try:
            np.savez(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, cache)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError:
        return


def load_arrays(cache: Path) -> dict[str, np.ndarray] | None:
    """What `save_arrays` wrote, or None when it is missing or damaged (np.load raises errors of many types)."""
    try:
        with np.load(cache) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception:
        return None


def _load(cache: Path, root: Path, classes: list[str]) -> ImageList | None:
    """The cached listing, or None when there is none or a folder has changed."""
    arrays = load_arrays(cache)
    if arrays is None:
        return None
    stamps = json.loads(arrays["folders"].tobytes())
    try:
        fresh = all(os.stat(root / name).st_mtime_ns == mtime for name, mtime in stamps)
    except OSError:
        return None
    if not fresh or [name for name, _ in stamps if "/" not in name] != classes:
        return None
    names = Names(arrays["block"], arrays["offsets"], f"{root}/")
    return ImageList(names, arrays["targets"], tuple(classes), int(arrays["bytes"]))
