"""Where a file of weights is: a path, a run's folder, an address, or the name of published weights."""

import contextlib
import hashlib
import http.client
import logging
import os
import re
import sys
import urllib.error
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

import torch

from involution.cache import cache_dir, writable_cache_dir
from involution.outage import wait_for_lock
from involution.weights import files
from involution.weights.published import PUBLISHED, Published

log = logging.getLogger("involution")


def fetch(location: str | Path, sha256: str | None = None) -> Path:
    """The local file of a path, an address or published weights.

    Downloads are kept in ``weights/`` of the cache folder. A file's hash is noted beside it when it is first used, and
    checked from then on.

    Args:
        location: a path, of a run's folder too (its ``best.pt``), an http(s), ftp or file URL, or a name in PUBLISHED.
        sha256: the file's SHA-256 or the beginning of it. A URL like ``rednet50-0123abcd.pth`` carries it.

    Raises:
        ValueError: the file cannot be had, or its hash does not match.
    """
    name, path = str(location), Path(location)
    if "://" in name:
        file = Path(urlparse(name).path).name
        in_name = re.search(r"-([0-9a-f]{8,64})\.", file)
        # the address's own hash keeps two files called model.pt apart
        file = f"{hashlib.sha256(name.encode()).hexdigest()[:8]}-{file}"
        path = _kept(name, file)
        try:
            _check(path, sha256 or (in_name[1] if in_name else None))
        except ValueError:
            for rejected in (path, _note(path)):  # such a download must not stay
                rejected.unlink(missing_ok=True)
            raise
        return path
    if path.is_dir():
        path = _best_of(path)
    elif name in PUBLISHED and not path.exists():
        published = PUBLISHED[name]
        path = _kept(published.url, Path(urlparse(published.url).path).name)
        _tell(name, published, path)
    elif name.lower() in ("true", "imagenet"):
        raise ValueError(
            f"{name} is no file of weights: give a path, or a name: {', '.join(PUBLISHED)}. Those of timm's models "
            "first become a file: torch.save(timm.create_model(NAME, pretrained=True).state_dict(), FILE)"
        )
    elif not path.is_file():
        raise ValueError(f"there is no file {path} (weights that go by a name: {', '.join(PUBLISHED)})")
    _check(path, sha256)
    return path


def _tell(name: str, published: Published, path: Path) -> None:
    told = (
        f"{name}: weights of {published.origin} ({published.url}), licence {published.licence}; top-1 on ImageNet as "
        f"published: {published.top1} %; the file is {path}"
    )
    if log.isEnabledFor(logging.INFO) and log.hasHandlers():
        log.info(told)
    elif os.environ.get("RANK", "0") == "0":  # in a library nobody has set up a log, and an origin should be seen
        print(told, file=sys.stderr)


def _kept(url: str, name: str) -> Path:
    """The file of an address, downloaded by one process when it is not there yet, with the hash it had at first."""
    path = cache_dir() / "weights" / name
    if not (path.is_file() and _note(path).is_file()):
        with _lock(path) as path:
            if not path.is_file():
                _download(url, path)
            if not _note(path).is_file():
                files.read(path)  # so that nothing but weights is kept for good
                with contextlib.suppress(OSError):  # a read-only folder
                    _note(path).write_text(f"{_hash(path)}  {path.name}\n")
    noted = _note(path).read_text().split()[:1] if _note(path).is_file() else []
    if noted and noted != [_hash(path)]:
        raise ValueError(
            f"{path} is not the file that it was when it was first used: its SHA-256 is {_hash(path)}, "
            f"{_note(path).name} says otherwise. If you know why, remove both"
        )
    return path


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[Path]:
    """The path, or where its folder cannot be written another, which no other process touches meanwhile."""
    if not path.is_file():
        path = writable_cache_dir() / "weights" / path.name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f".{path.name}.lock"), "w")  # noqa: SIM115
    except OSError:  # the file is there, in a folder that cannot be written: nobody changes it
        yield path
        return
    with lock:
        wait_for_lock(lock)
        yield path


def _download(url: str, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        torch.hub.download_url_to_file(url, str(temporary), progress=True)
        files.read(temporary)
        temporary.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise ValueError(
            f"{url} cannot be downloaded: {getattr(error, 'reason', error)}. On a machine without a network: "
            f"download it elsewhere and put it at {path}, from where it is read without asking"
        ) from error
    except ValueError as error:
        raise ValueError(f"what came from {url} is no file of weights: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _note(path: Path) -> Path:
    """The file with its hash, as sha256sum writes it."""
    return path.with_name(f"{path.name}.sha256")


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _best_of(folder: Path) -> Path:
    """The best checkpoint of a run.

    Raises:
        ValueError: there is none; what to do.
    """
    if folder.name == "checkpoints" and (folder / "last.pt").is_file():
        folder = folder.parent
    best, last = folder / "checkpoints" / "best.pt", folder / "checkpoints" / "last.pt"
    if best.is_file():
        return best
    if last.is_file():
        raise ValueError(f"there is no file {best}: the run has not been evaluated yet; take {last}")
    raise ValueError(f"there is no file {best}: {folder} is no folder of a run")


def _check(path: Path, sha256: str | None) -> None:
    if sha256:
        found = _hash(path)
        if not found.startswith(sha256.lower()):
            raise ValueError(f"{path} has the SHA-256 {found}; it should begin with {sha256}")
