"""Checkpoints that can be trusted: atomic, hashed, with the one before kept until the next is whole.

A file is written under a temporary name, flushed to the disk and renamed, then the folder is flushed: at every moment
`last.pt` is a whole checkpoint. The hash covers the contents (every tensor's bytes, every number), so that it is
checked whatever the container; damage is reported and the newest whole checkpoint before it used.
"""

import hashlib
import io
import logging
import os
import pickle
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from involution.engine.errors import Stopped, UserError
from involution.weights import why_unreadable

log = logging.getLogger("involution")
State = dict[str, Any]


class DamagedCheckpoint(UserError):
    """A file that is not a whole checkpoint."""


class ForeignFile(DamagedCheckpoint):
    """A readable file, but none that train.py wrote: perhaps weights alone."""


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


def detach(value: Any) -> Any:
    """A copy on the CPU that later training steps do not touch, of plain dicts, lists and tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: detach(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [detach(item) for item in value]
    return value


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
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read(path: Path) -> State:
    """Read and verify a checkpoint; nothing in the file is executed (weights_only).

    Raises:
        UserError: when there is no such file.
        DamagedCheckpoint: when it is truncated, altered, or no checkpoint of this project.
    """
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise DamagedCheckpoint(f"{path} cannot be read as a checkpoint: {why_unreadable(error)}") from error
    if not isinstance(state, dict) or "sha256" not in state or "model" not in state:
        raise ForeignFile(f"{path} is not a checkpoint that train.py wrote")
    if state.pop("sha256") != digest(state):
        raise DamagedCheckpoint(f"{path} is damaged: its contents do not match its SHA-256")
    return state


def best_weights(state: State) -> dict[str, Tensor]:
    """The weights to evaluate: their average where the run kept one."""
    if state["ema"] is None:
        return state["model"]
    return {key.removeprefix("module."): value for key, value in state["ema"].items() if key != "n_averaged"}


def mismatch(model: nn.Module, weights: dict[str, Tensor]) -> str:
    """The keys that a model and a state dict do not share, or that have another shape; empty when all fit."""
    own = model.state_dict()
    missing = [key for key in own if key not in weights]
    unexpected = [key for key in weights if key not in own]
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    return "; ".join(
        f"{what}: {', '.join(keys[:5])}{f' and {len(keys) - 5} more' if len(keys) > 5 else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    )


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a state dict.

    Raises:
        UserError: when the weights are those of another model, naming the keys that differ.
    """
    if problems := mismatch(model, weights):
        raise UserError(f"the checkpoint is of another model: {problems}")
    model.load_state_dict(weights)


class CheckpointFolder:
    """A run's checkpoints: the newest `keep` as `step-*.pt`, of which `last.pt` and `best.pt` are links to one.

    Saving copies the state and returns; a thread writes it. A failure to write surfaces at the next call of any method.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None

    def save(self, state: State, step: int, best: bool = False) -> None:
        """Save the state after `step` steps as the last checkpoint, and as the best one too if `best`."""
        self.wait()
        self._writing = self._writer.submit(self._write, detach(state), step, best)

    def check(self) -> None:
        """Raise what went wrong with the last save, if that is known by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the last save is on the disk, and raise what went wrong with it."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            try:
                writing.result()
            except OSError as error:
                raise Stopped(
                    f"the checkpoint could not be written to {self.folder}: {error.strerror or error}. The last good "
                    "one is intact: make room (or set output_root to another disk) and run again to continue from it"
                ) from error

    def settle(self) -> None:
        """Wait for the last save when the run ends for another reason, which its failure should not hide."""
        try:
            self.wait()
        except Stopped as error:
            log.error("%s", error)

    def _write(self, state: State, step: int, best: bool) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for rubbish in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            rubbish.unlink(missing_ok=True)
        path = self.folder / f"step-{step:08d}.pt"
        write(path, state)
        if best:  # first: a `last.pt` that knows a best score must not be ahead of that score's weights
            self._link(path, "best.pt")
        self._link(path, "last.pt")
        steps = self._steps()
        behind = steps[steps.index(path) :]
        for old in steps:  # those ahead are of a course that was given up (damaged, or train.resume=PATH)
            if old not in behind[: self.keep]:
                old.unlink()

    def _link(self, path: Path, name: str) -> None:
        """Make `name` another name of the file `path`, atomically."""
        temporary = self.folder / f".{name}.{os.getpid()}.tmp"
        try:
            try:
                os.link(path, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(path, temporary)
            os.replace(temporary, self.folder / name)
        finally:
            temporary.unlink(missing_ok=True)  # renaming between two names of one file leaves both
        _flush_folder(self.folder)

    def _steps(self) -> list[Path]:
        """The numbered checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.pt"), reverse=True)

    def newest(self) -> tuple[Path, State] | None:
        """The newest whole checkpoint, or None where there is none; damaged ones are reported and passed over."""
        tried: list[Path] = []
        for path in [self.folder / "last.pt", *self._steps()]:
            if not path.exists() or any(path.samefile(other) for other in tried):
                continue
            tried.append(path)
            try:
                return path, read(path)
            except DamagedCheckpoint as error:
                log.warning("%s; trying the one before it", error)
        if tried:
            raise UserError(f"every checkpoint in {self.folder} is damaged; start over with train.resume=never")
        return None
