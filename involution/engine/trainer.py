"""The training loop. Read `fit`, then `Learner.step`; everything that affects the next step is in `state_dict`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from involution.engine.checkpoint import CheckpointFolder
from involution.engine.distributed import Agreement, World, broadcast_buffers, gather_objects, part, progress
from involution.engine.errors import Preempted
from involution.engine.evaluate import autocast, evaluate
from involution.engine.learner import Learner
from involution.engine.meter import Meter
from involution.engine.monitor import Monitor
from involution.engine.optim import Schedule
from involution.engine.options import TrainOptions
from involution.engine.run import RunFolder
from involution.engine.signals import StopRequest
from involution.engine.state import rng_state, set_rng_state
from involution.engine.tasks import Batch, Gallery, Loader, Task, TrainLoader
from involution.weights.run_file import State

log = logging.getLogger("involution")
SAVE, STOP, REQUEUE = 1, 2, 3  # what ranks can agree on between steps; the highest wish counts


class Trainer:
    """Trains a model on a task.

    Args:
        model: on `world.device`, in its memory format.
        val_loader: finite; this rank's share.
        val_size: number of its samples, over all ranks.
        extra_state: goes into every checkpoint as it is: "config" (also shown in TensorBoard), "class_names".
        gallery: what to draw at every evaluation, if anything; needed on rank 0 only.
    """

    def __init__(
        self, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule,
        train_loader: TrainLoader, val_loader: Loader, *, val_size: int, options: TrainOptions, world: World,
        run: RunFolder, extra_state: dict[str, Any], gallery: Gallery | None = None,
    ) -> None:  # fmt: skip
        self.learner = Learner(model, task, optimizer, schedule, options, world)
        self.task, self.schedule = task, schedule
        self.train_loader, self.val_loader, self.val_size = train_loader, val_loader, val_size
        self.options, self.world, self.run, self.extra_state = options, world, run, extra_state
        self.gallery = gallery

        self.meter = Meter(world, task.parts)
        self.checkpoints = CheckpointFolder(run.checkpoints, options.keep_checkpoints)
        self.agreement = Agreement(world)
        self.stop = StopRequest()

        self.steps_per_epoch = train_loader.steps_per_epoch
        assert options.epochs is not None, "TrainOptions.in_epochs has been called"
        self.limit = options.epochs * self.steps_per_epoch
        self.limit = min(self.limit, options.max_steps or self.limit)
        self.step = 0  # optimizer steps done
        self.saved = -1  # the step of the last checkpoint
        self.closed = 0  # the last step that was evaluated and recorded
        self.best: float | None = None
        self.metrics: dict[str, Any] = {}  # of the last evaluation
        self.evaluated = 0  # the step of that

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the run's summary.

        Raises:
            Preempted: a signal came; the state is saved.
            Stopped: training diverged or a checkpoint could not be written.
        """
        self.monitor = Monitor(
            self.run.path, self.world.is_main, self.step, self.limit, self.steps_per_epoch, self.extra_state["config"],
            self.gallery,
        )  # fmt: skip
        self.last_save = time.monotonic()
        self.train_loader.seek(self.step)
        batches = iter(self.train_loader)
        try:
            with self.stop:
                while self.step < self.limit or self.closed != self.step:
                    self.train_epoch(batches)
                    self.finish_epoch()
                if self.evaluated != self.step:  # the run was to be longer once, and ends between two evaluations
                    self.evaluate()
                self.agreement.finish()
                self.checkpoints.wait()
                self.report_left_out()
                part()
        finally:
            self.checkpoints.settle()
            self.monitor.close()
        return self.summary()

    @property
    def ended(self) -> bool:
        """Whether there is nothing left to train."""
        return self.step >= self.limit and self.closed == self.step

    def close(self) -> None:
        """Stop the loaders' processes and threads."""
        self.train_loader.close()
        self.val_loader.close()

    def train_epoch(self, batches: Iterator[Batch]) -> None:
        """Train to the end of the epoch under way, from wherever in it the run stands."""
        end = min((self.closed // self.steps_per_epoch + 1) * self.steps_per_epoch, self.limit)
        log_every = self.options.log_every_steps
        check_every = min(log_every, self.options.max_bad_steps)
        self.learner.model.train()
        self.meter.resume()
        while self.step < end:
            self.train_step(batches)
            self.monitor.step(self.step)
            if self.step % check_every == 0:
                self.check_numbers()
            if self.step % log_every == 0:
                values = {"loss": self.learner.guard.recent_loss(), "lr": self.schedule(self.step - 1)}
                self.monitor.interval(self.step, values | self.meter.interval())
            self.between_steps()
        self.meter.pause()

    def train_step(self, batches: Iterator[Batch]) -> None:
        """Fetch this rank's part of a step and learn from it."""
        samples = self.train_loader.samples(self.step) / self.world.size  # an epoch's last step may have fewer
        count = self.train_loader.micro_batches(self.step)
        mine = (self.fetch(batches) for _ in range(count))
        losses, bad = self.learner.step(self.step, mine, count, samples)
        self.meter.add(losses, samples, bad)
        self.step += 1

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        begin = time.monotonic()
        batch = next(batches)
        self.meter.waiting += time.monotonic() - begin
        progress()
        return batch.to(self.world.device, channels_last=self.options.channels_last)

    def check_numbers(self) -> None:
        """Stop the run when too many steps in a row were not finite."""
        self.learner.guard.check(self.step, self.schedule(max(self.step - 1, 0)))

    def between_steps(self) -> None:
        """Save when it is time to, leave when a signal came: all ranks after the same step."""
        self.checkpoints.check()
        minutes, steps = self.options.checkpoint_every_minutes, self.options.checkpoint_every_steps
        due = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        agreed = self.poll(SAVE if due else 0)
        # among ranks, asked for once more at the very poll that brought the answer
        again = self.world.size > 1 and self.step == self.saved + 1
        if (agreed == SAVE and not again) or (steps and self.step % steps == 0):
            self.save()

    def poll(self, request: int = 0) -> int:
        """Exchange wishes with the other ranks; a stop that any of them was asked for is carried out here."""
        wish = REQUEUE if self.stop.requeue else STOP if self.stop.received else request
        agreed = self.agreement.poll(wish)
        if agreed >= STOP:
            self.agreement.finish()
            self.save(last=True)
            self.checkpoints.wait()
            part()
            again = "again, without train.resume=never," if self.options.resume == "never" else "again"
            raise Preempted(
                f"stopped after step {self.step}; the state is saved: run the same command {again} to continue",
                requeue=agreed == REQUEUE,
            )
        return agreed

    def finish_epoch(self) -> None:
        """Evaluate, record the epoch's line, save."""
        self.check_numbers()
        epoch = math.ceil(self.step / self.steps_per_epoch)
        scores: dict[str, Any] = {}
        last = self.step == self.limit
        if epoch % self.options.evaluate_every_epochs == 0 or last:
            scores = self.evaluate()
        score = scores.get(self.task.headline)
        better = score is not None and (self.best is None or score > self.best)
        is_best = better and (last or not self.learner.guard.in_row.item())
        self.best = score if is_best else self.best
        line = {"epoch": epoch, "step": self.step, "lr": self.schedule(self.step - 1)} | self.meter.epoch()
        line |= {f"val_{name}": scores.get(name) for name in self.task.names}
        self.meter.start_epoch()
        self.closed = self.step
        if self.world.is_main:
            self.run.append_metrics(line)
        self.monitor.epoch(line)
        self.save(is_best, last)

    def evaluate(self) -> dict[str, Any]:
        """Score the model (its average where one is kept) on the whole validation set."""
        model = self.learner.model if self.learner.ema is None else self.learner.ema.module
        broadcast_buffers(model)
        scores = evaluate(
            model, self.val_loader, self.task.evaluation(), self.world, samples=self.val_size,
            precision=self.options.precision, channels_last=self.options.channels_last, on_batch=self.poll,
        )  # fmt: skip
        with autocast(self.world.device, self.options.precision):  # other types would compile other kernels
            self.monitor.evaluated(model, self.step)
        self.metrics = {name: scores[name] for name in self.task.names}  # without how long it took
        self.evaluated = self.step
        return scores

    def save(self, is_best: bool = False, last: bool = False) -> None:
        """Write a checkpoint, in the background; but none amid non-finite steps, which its weights may cause, unless it
        is the `last` of this process."""
        self.check_numbers()
        if self.learner.guard.in_row.item() and not last:
            return
        self.last_save, self.saved = time.monotonic(), self.step
        state = self.state_dict()
        if self.world.is_main:
            self.checkpoints.save(state, self.step, is_best)

    def state_dict(self) -> State:
        """All that the next step depends on, and what a reader of the checkpoint needs. A collective call."""
        return {
            **self.learner.state_dict(),
            "meter": self.meter.state_dict(),
            "rng": gather_objects(rng_state(self.world)),
            "step": self.step,
            "closed": self.closed,
            "best": self.best,
            "metrics": self.metrics,
            "evaluated": self.evaluated,
            **self.extra_state,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`, on this or another number of ranks."""
        self.learner.load_state_dict(state)
        self.meter.load_state_dict(state["meter"])
        set_rng_state(state["rng"], self.world)
        self.step, self.closed = state["step"], state["closed"]
        self.best, self.metrics = state["best"], state["metrics"]
        self.evaluated = state.get("evaluated", self.closed)

    def report_left_out(self) -> None:
        """Say how many files the ranks met that could not be read (data.on_error=skip). A collective call."""
        left_out = set().union(*gather_objects(set(self.train_loader.skipped)))
        if left_out and self.world.is_main:
            log.warning("%d files do not decode: training left them out", len(left_out))

    def summary(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run.path),
            "epochs": math.ceil(self.step / self.steps_per_epoch),
            "steps": self.step,
            **{f"val_{name}": self.metrics[name] for name in self.task.names if name != "loss"},
            f"best_{self.task.headline}": self.best,
        }
