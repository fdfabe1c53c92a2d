"""The checkpoints of train.py: a file is at every moment whole, and a hash covers its contents.

It is written under a temporary name, flushed to the disk and renamed, then the folder is flushed. The hash is over
every tensor's bytes and every number, so that it is checked whatever the container.
"""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from involution.weights import files

State = dict[str, Any]


class DamagedCheckpoint(ValueError):
    """A file that is not a whole checkpoint."""


def digest(value: Any) -> str:
    """SHA-256 of nested dicts, lists, tensors, numbers and strings, independent of how they are stored."""
    sha = hashlib.sha256()
    for piece in _pieces(value):
        sha.update(piece)
    return sha.hexdigest()


def _pieces(value: Any) -> Iterator[Any]:
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield f"key {key!r}".encode()
            yield from _pieces(item)
    elif isinstance(value, list | tuple):
        yield f"list {len(value)}".encode()
        for item in value:
            yield from _pieces(item)
    else:
        yield repr(value).encode()


def write(path: Path, state: State) -> None:
    """Write a checkpoint so that `path` is, at every moment, either the old file or the whole new one."""
    buffer = io.BytesIO()
    torch.save({**state, "sha256": digest(state)}, buffer)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make the folder's entries last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> State:
    """Read and verify a checkpoint; nothing in the file is executed.

    Raises:
        ValueError: there is no such file.
        DamagedCheckpoint: it is truncated, altered, or no checkpoint of this project.
    """
    if not path.is_file():
        raise ValueError(f"there is no checkpoint {path}")
    try:
        contents, _ = files.load(path, "a checkpoint")
    except ValueError as error:
        raise DamagedCheckpoint(str(error)) from error
    if not is_ours(contents):
        raise DamagedCheckpoint(f"{path} is not a checkpoint that train.py wrote")
    return verified(contents, path)


def is_ours(contents: Any) -> bool:
    """Whether train.py wrote this."""
    return isinstance(contents, dict) and "sha256" in contents and "model" in contents


def verified(contents: State, path: Path) -> State:
    """The state in a checkpoint's contents.

    Raises:
        DamagedCheckpoint: its hash is of something else.
    """
    state = {key: value for key, value in contents.items() if key != "sha256"}
    if contents["sha256"] != digest(state):
        raise DamagedCheckpoint(f"{path} is damaged: its contents do not match its SHA-256")
    return state


def best_weights(state: State) -> dict[str, Tensor]:
    """The weights to evaluate: their average where the run kept one."""
    if state["ema"] is None:
        return state["model"]
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}
