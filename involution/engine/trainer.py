"""The training loop. Read `fit`, then `train_step`; everything that affects the next step is in `state_dict`."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from involution.engine.checkpoint import CheckpointFolder, State, load_weights
from involution.engine.distributed import Agreement, World, broadcast_buffers, gather_objects
from involution.engine.errors import Preempted, UserError
from involution.engine.evaluate import autocast, evaluate, to_device
from involution.engine.guard import Guard
from involution.engine.meter import Meter
from involution.engine.monitor import Monitor
from involution.engine.optim import Schedule, exponential_average, prepare
from involution.engine.options import TrainOptions
from involution.engine.run import RunFolder
from involution.engine.signals import StopRequest
from involution.engine.state import rng_state, set_rng_state
from involution.engine.task import Task

if TYPE_CHECKING:
    from data import Batch

log = logging.getLogger("involution")
SAVE, STOP = 1, 2  # what ranks can agree on between steps


class TrainLoader(Protocol):
    """An endless stream of this rank's micro-batches, whose position is nothing but the step (see data/)."""

    steps_per_epoch: int

    def __iter__(self) -> Iterator[Batch]: ...
    def micro_batches(self, step: int) -> int: ...
    def seek(self, step: int) -> None: ...


class Trainer:
    """Trains a model on a task.

    Args:
        model: on `world.device`, in its memory format.
        train_size, val_size: numbers of samples, over all ranks.
        val_loader: finite; this rank's share.
        extra_state: goes into every checkpoint as it is: "config" (also shown in TensorBoard), "class_names".
    """

    def __init__(
        self, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule,
        train_loader: TrainLoader, val_loader: Iterable[Batch], *, train_size: int, val_size: int,
        options: TrainOptions, world: World, run: RunFolder, extra_state: dict[str, Any],
    ) -> None:  # fmt: skip
        self.model, self.task, self.schedule = model, task, schedule
        self.optimizer = prepare(optimizer)
        self.train_loader, self.val_loader = train_loader, val_loader
        self.train_size, self.val_size = train_size, val_size
        self.options, self.world, self.run, self.extra_state = options, world, run, extra_state

        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        self.ema = exponential_average(model, options.ema_decay) if options.ema_decay else None
        self.ddp = self._distribute(model) if world.size > 1 else None
        self.forward: Any = self.ddp or model
        if options.compile:
            self.forward = torch.compile(self.forward)
        self.guard = Guard([model] + ([self.ema] if self.ema else []), options.max_bad_steps, world.device)
        self.meter = Meter(world.device)
        self.checkpoints = CheckpointFolder(run.checkpoints, options.keep_checkpoints)
        self.agreement = Agreement(world)
        self.stop = StopRequest()

        self.steps_per_epoch = train_loader.steps_per_epoch
        self.limit = options.epochs * self.steps_per_epoch
        self.limit = min(self.limit, options.max_steps or self.limit)
        self.step = 0  # optimizer steps done
        self.closed = 0  # the last step that was evaluated and recorded
        self.best: float | None = None
        self.metrics: dict[str, float] = {}  # of the last evaluation

    def _distribute(self, model: nn.Module) -> DistributedDataParallel:
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        # buffers are broadcast when somebody reads them (evaluation, checkpoint), not in every step
        return DistributedDataParallel(model, devices, broadcast_buffers=False, gradient_as_bucket_view=True)

    def fit(self) -> dict[str, Any]:
        """Train to the end and return the run's summary.

        Raises:
            Preempted: a signal came; the state is saved.
            Stopped: training diverged or a checkpoint could not be written.
        """
        self.monitor = Monitor(
            self.run.path, self.world.is_main, self.step, self.limit, self.steps_per_epoch, self.extra_state["config"]
        )
        self.last_save = time.monotonic()
        self.train_loader.seek(self.step)
        batches = iter(self.train_loader)
        try:
            with self.stop:
                while self.step < self.limit or self.closed != self.step:
                    self.train_epoch(batches)
                    self.finish_epoch()
                self.agreement.finish()
                self.checkpoints.wait()
        finally:
            self.monitor.close()
        return self.summary()

    def train_epoch(self, batches: Iterator[Batch]) -> None:
        """Train to the end of the epoch under way, from wherever in it the run stands."""
        end = min((self.closed // self.steps_per_epoch + 1) * self.steps_per_epoch, self.limit)
        log_every, check_every = self.options.log_every_steps, self.options.max_bad_steps
        self.model.train()
        self.meter.resume()
        while self.step < end:
            self.train_step(batches)
            self.monitor.step(self.step)
            if self.step % min(log_every, check_every) == 0:
                self.guard.check(self.step, self.schedule(self.step))
            if self.step % log_every == 0:
                values = {"loss": self.guard.recent_loss(), "lr": self.schedule(self.step - 1)}
                self.monitor.interval(self.step, values | self.meter.interval(self.world.size))
            self.between_steps()
        self.meter.pause()

    def train_step(self, batches: Iterator[Batch]) -> None:
        """One optimizer step on the mean loss over the global batch, however many ranks and micro-batches share it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(self.step)
        # an epoch's last step may be smaller; ranks average gradients of what is here a sum, hence their number
        start = self.step % self.steps_per_epoch * self.options.global_batch_size
        samples = min(self.options.global_batch_size, self.train_size - start) / self.world.size
        micro_batches = self.train_loader.micro_batches(self.step)
        total = torch.zeros((), device=self.world.device)
        for i in range(micro_batches):
            batch = self.fetch(batches)
            last = i == micro_batches - 1
            with nullcontext() if last or self.ddp is None else self.ddp.no_sync():
                with autocast(self.world.device, self.options.precision):
                    loss = self.task.loss(self.forward, batch)
                self.scaler.scale(loss / samples).backward()
            total += loss.detach()
        bad = self.update()
        self.meter.add(total, samples, bad)
        self.guard.record(bad, total / samples)
        self.step += 1

    def update(self) -> Tensor:
        """Apply the gradients unless they are not finite, found and obeyed on the device; returns whether."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.options.clip_grad_norm:
            clip_grads_with_norm_(self.parameters, self.options.clip_grad_norm, norm)
        bad = ~torch.isfinite(norm)  # of the gradients' sum over ranks, so all of them see the same
        self.optimizer.grad_scale, self.optimizer.found_inf = None, bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.scaler.update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return bad

    def fetch(self, batches: Iterator[Batch]) -> Batch:
        begin = time.monotonic()
        batch = next(batches)
        self.meter.waiting += time.monotonic() - begin
        return to_device(batch, self.world.device, self.options.channels_last)

    def between_steps(self) -> None:
        """Save when it is time to, leave when a signal came: all ranks after the same step."""
        minutes, steps = self.options.checkpoint_every_minutes, self.options.checkpoint_every_steps
        due = minutes is not None and time.monotonic() - self.last_save > 60 * minutes
        agreed = self.poll(SAVE if due else 0)
        if agreed == SAVE or (steps and self.step % steps == 0):
            self.save()

    def poll(self, request: int = 0) -> int:
        """Exchange wishes with the other ranks; a stop that any of them was asked for is carried out here."""
        if request == SAVE:
            self.last_save = time.monotonic()
        agreed = self.agreement.poll(STOP if self.stop.received else request)
        if agreed == STOP:
            self.agreement.finish()
            self.meter.pause()
            self.save()
            self.checkpoints.wait()
            raise Preempted(
                f"stopped after step {self.step}; the state is saved: run the same command again to continue"
            )
        return agreed

    def finish_epoch(self) -> None:
        """Evaluate, record the epoch's line, save."""
        self.guard.check(self.step, self.schedule(self.step))
        epoch = math.ceil(self.step / self.steps_per_epoch)
        scores: dict[str, float] = {}
        if epoch % self.options.evaluate_every_epochs == 0 or self.step == self.limit:
            scores = self.evaluate()
            self.metrics = scores
        score = scores.get(self.task.headline)
        is_best = score is not None and (self.best is None or score > self.best)
        self.best = score if is_best else self.best
        line = {"epoch": epoch, "step": self.step, "lr": self.schedule(self.step - 1)} | self.meter.epoch()
        line |= {f"val_{name}": scores.get(name) for name in self.task.names}
        self.meter.start_epoch()
        self.closed = self.step
        if self.world.is_main:
            self.run.append_metrics(line)
        self.monitor.epoch(line)
        self.save(is_best)

    def evaluate(self) -> dict[str, float]:
        """Score the model (its average where one is kept) on the whole validation set."""
        model = self.model if self.ema is None else self.ema
        broadcast_buffers(model)
        return evaluate(
            model, self.val_loader, self.task, self.world, samples=self.val_size, precision=self.options.precision,
            channels_last=self.options.channels_last, on_batch=self.poll,
        )  # fmt: skip

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint, in the background."""
        self.last_save = time.monotonic()
        self.guard.check(self.step, self.schedule(self.step))
        state = self.state_dict()
        if self.world.is_main:
            self.checkpoints.save(state, self.step, is_best)

    def state_dict(self) -> State:
        """All that the next step depends on, and what a reader of the checkpoint needs. A collective call."""
        broadcast_buffers(self.model)
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "meter": self.meter.state_dict(),
            "rng": gather_objects(rng_state(self.world)),
            "step": self.step,
            "closed": self.closed,
            "best": self.best,
            "metrics": self.metrics,
            **self.extra_state,
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`, on this or another number of ranks."""
        load_weights(self.model, state["model"])
        if self.ema is not None:
            if state["ema"] is None:
                raise UserError("train.ema_decay is set, but the checkpoint to resume has no average of the weights")
            self.ema.load_state_dict(state["ema"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())
        self.guard.load_state_dict(state["guard"])
        self.meter.load_state_dict(state["meter"])
        set_rng_state(state["rng"], self.world)
        self.step, self.closed = state["step"], state["closed"]
        self.best, self.metrics = state["best"], state["metrics"]

    def summary(self) -> dict[str, Any]:
        return {
            "run_dir": str(self.run.path),
            "epochs": self.step // self.steps_per_epoch,
            "steps": self.step,
            **{f"val_{name}": self.metrics[name] for name in self.task.names if name != "loss"},
            f"best_{self.task.headline}": self.best,
        }
