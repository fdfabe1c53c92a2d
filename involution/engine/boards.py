"""Where curves and pictures go: TensorBoard beside the run, and Weights & Biases on request."""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch import Tensor

from involution.engine.errors import UserError
from involution.engine.same_run import PLACE

log = logging.getLogger("involution")


class Board(Protocol):
    """What TensorBoard's SummaryWriter calls these."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None: ...
    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def check(kind: str) -> None:
    """Raises UserError for a value of `logging` whose package is missing."""
    if kind == "wandb" and importlib.util.find_spec("wandb") is None:
        raise UserError("logging=wandb needs Weights & Biases: pip install wandb")


def open_boards(kind: str, folder: Path, step: int, config: dict[str, Any]) -> list[Board]:
    """The boards of a run that goes on from `step` (later entries of an earlier process are dropped or ignored)."""
    boards: list[Board] = []
    if importlib.util.find_spec("tensorboard") is None:
        log.warning("TensorBoard is not installed: no curves, but metrics.jsonl has every epoch")
    else:
        boards.append(_tensorboard(folder, step, config))
    if kind == "wandb":
        began = (folder / "wandb" / "run-id").exists()
        try:
            boards.append(Wandb(folder, config))
        except UserError as error:
            if not began:
                raise
            log.warning("%s; the run goes on without it", error)
    return boards


def _tensorboard(folder: Path, step: int, config: dict[str, Any]) -> Board:
    from torch.utils.tensorboard import SummaryWriter  # takes over a second to import
    from torch.utils.tensorboard.summary import hparams

    board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)  # what was logged at this step stays
    board.add_text("config", f"```yaml\n{yaml.safe_dump(config, sort_keys=False)}\n```", step)
    # SummaryWriter.add_hparams would put them into a run of their own, away from the curves
    _, session, _ = hparams(dict(hyperparameters(config)), {})
    board._get_file_writer().add_summary(session)
    return board


def hyperparameters(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float | str]]:
    """The values of a configuration that can make a run another one, as TensorBoard's HParams tab takes them."""
    for key, value in config.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from hyperparameters(value, f"{name}.")
        elif name not in PLACE:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            yield name, value if number else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]


class Wandb:
    """A Weights & Biases run, kept in `<run folder>/wandb`; a resumed run goes on in the same one.

    Project, account and mode are W&B's own variables: WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline.

    Raises:
        UserError: when W&B refuses, for example without a login.
    """

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        import wandb

        self._wandb, known = wandb, folder / "wandb" / "run-id"
        known.parent.mkdir(exist_ok=True)
        number = known.read_text() if known.exists() else uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                dir=folder, id=number, name=folder.name, config=config, resume="allow",
                settings=wandb.Settings(silent=True),
            )  # fmt: skip
        except wandb.errors.Error as error:
            raise UserError(f"logging=wandb: {error}; run 'wandb login', or set WANDB_MODE=offline") from error
        known.write_text(number)

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        self._run.log({tag: scalar_value}, step=global_step)

    def add_image(self, tag: str, img_tensor: Tensor, global_step: int) -> None:
        self._run.log({tag: self._wandb.Image(img_tensor)}, step=global_step)

    def flush(self) -> None:
        """W&B sends by itself."""

    def close(self) -> None:
        self._run.finish()
