"""A run's checkpoints: the newest ones are kept, and the last whole one is found again.

At every moment `last.pt` is a whole checkpoint; damage is reported and the newest whole one before it used. The files
themselves: `involution.weights.run_file`.
"""

import logging
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from involution.engine.errors import Stopped, UserError
from involution.weights import mismatch
from involution.weights.run_file import DamagedCheckpoint, State, flush_folder, read, write

log = logging.getLogger("involution")


def detach(value: Any) -> Any:
    """A copy on the CPU that later training steps do not touch, of plain dicts, lists, tuples and tensors."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: detach(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [detach(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    return value


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
        self._writing: Future[None] | None = None

    def save(self, state: State, step: int, best: bool = False) -> None:
        """Save the state after `step` steps as the last checkpoint, and as the best one too if `best`."""
        self.wait()
        # A thread of its own that ends: one that stays keeps its OpenMP threads, and where they are more than the cores
        # with those of training, all of them sleep where they would spin (measured: 36 images/s fell to 25).
        writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing = writer.submit(self._write, detach(state), step, best)
        writer.shutdown(wait=False)

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
        # first: a `last.pt` that knows a best score must not be ahead of that score's weights. Of a score from another
        # folder (train.resume=PATH) there are none here, and these come closest
        if best or (state.get("best") is not None and not (self.folder / "best.pt").exists()):
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
        flush_folder(self.folder)

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
