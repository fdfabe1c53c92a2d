"""What the user sees while a run trains: a progress bar on a terminal, plain lines in a log, curves on boards."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from involution.checks import first_line
from involution.engine.boards import open_boards

if TYPE_CHECKING:
    from involution.engine.tasks import Gallery

log = logging.getLogger("involution")
WAIT_LIMIT = 0.2  # share of the time waiting for data beyond which the loader is called the bottleneck


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Monitor:
    """Shows and records progress; on ranks other than 0 it does nothing.

    Args:
        total_steps: of the whole run.
        step: where this process starts.
        config: of the run; `logging` in it chooses the boards.
        gallery: what to draw after every evaluation, if anything.
    """

    def __init__(
        self, folder: Path, is_main: bool, step: int, total_steps: int, steps_per_epoch: int, config: dict[str, Any],
        gallery: Gallery | None = None,
    ) -> None:  # fmt: skip
        self.is_main, self._gallery = is_main, gallery
        self.total_steps, self.steps_per_epoch = total_steps, steps_per_epoch
        self._start, self._start_step = time.monotonic(), step
        self._warned = False
        if not is_main:
            return
        self._boards = open_boards(config.get("logging", "tensorboard"), folder, step, config)
        self._redirect = logging_redirect_tqdm([log])
        self._redirect.__enter__()
        log.handlers[-1].setLevel(logging.INFO)  # the redirection forgets the console's level
        self._bar = tqdm(
            total=total_steps,
            initial=step,
            unit="step",
            dynamic_ncols=True,
            leave=False,
            disable=not sys.stderr.isatty(),
        )

    def step(self, step: int) -> None:
        """Count a finished step."""
        if self.is_main:
            self._bar.update(step - self._bar.n)

    def interval(self, step: int, values: dict[str, float]) -> None:
        """Show what the last few steps were like: loss, lr, images_per_s, data_wait."""
        if not self.is_main:
            return
        for name, value in values.items():
            self._scalar(f"train/{name}", value, step)
        epoch = step / self.steps_per_epoch
        line = (
            f"epoch {epoch:.2f}  step {step}/{self.total_steps}  loss {values['loss']:.4f}  lr {values['lr']:.4g}  "
            f"{values['images_per_s']:.0f} images/s  waiting for data {values['data_wait']:.0%}  "
            f"left {self._time_left(step)}"
        )
        log.log(logging.INFO if self._bar.disable else logging.DEBUG, line)  # the file gets it in any case
        self._bar.set_postfix_str(f"loss {values['loss']:.3f}, {values['images_per_s']:.0f} images/s")

    def evaluated(self, model: nn.Module, step: int) -> None:
        """Draw what the evaluated model makes of the gallery."""
        if self.is_main and self._gallery is not None:
            for title, picture in self._gallery.draw(model).items():
                self._tell("add_image", title, picture, step)

    def epoch(self, line: dict[str, Any]) -> None:
        """Show and record an epoch's line of metrics.jsonl."""
        if not self.is_main:
            return
        for name, value in line.items():
            if name not in ("epoch", "step") and value is not None:
                self._scalar(f"epoch/{name}", value, line["step"])
        self._tell("flush")
        scores = "  ".join(
            f"{k} {v:.4g}" for k, v in line.items() if k.startswith(("train_", "val_")) and v is not None
        )
        log.info(
            "epoch %d done  %s  %.0f images/s  %s, left %s",
            line["epoch"], scores, line["images_per_s"], duration(line["seconds"]), self._time_left(line["step"]),
        )  # fmt: skip
        if line["data_wait"] > WAIT_LIMIT and not self._warned:
            self._warned = True
            log.warning(
                "data is the bottleneck: the model waits for it %.0f%% of the time. More data.workers, "
                "data.loader=dali (classifiers), a faster disk or smaller stored images help",
                100 * line["data_wait"],
            )

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._tell("add_scalar", name, value, step)

    def _tell(self, method: str, *values: Any) -> None:
        """Call every board; one that fails (its server, its disk) is left out from then on, and the run goes on."""
        for board in list(self._boards):
            try:
                getattr(board, method)(*values)
            except Exception as error:
                self._boards.remove(board)
                log.warning("%s has failed and gets no more curves: %s", type(board).__name__, first_line(error))

    def _time_left(self, step: int) -> str:
        done = step - self._start_step
        return duration((time.monotonic() - self._start) / done * (self.total_steps - step)) if done else "?"

    def close(self) -> None:
        if self.is_main:
            self._bar.close()
            self._redirect.__exit__(None, None, None)
            self._tell("close")
