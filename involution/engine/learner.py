"""One optimizer step, and everything that it changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from involution.engine.checkpoint import load_weights
from involution.engine.distributed import World, broadcast_buffers
from involution.engine.errors import UserError
from involution.engine.evaluate import autocast
from involution.engine.graphs import Captured
from involution.engine.guard import Guard
from involution.engine.optim import Schedule, Update, exponential_average
from involution.engine.options import TrainOptions
from involution.engine.tasks import Batch, Task
from involution.weights.run_file import State


class Learner:
    """The model with its optimizer, loss scale, average and guard against numbers that are not finite."""

    def __init__(
        self, model: nn.Module, task: Task, optimizer: torch.optim.Optimizer, schedule: Schedule,
        options: TrainOptions, world: World,
    ) -> None:  # fmt: skip
        self.model, self.task, self.schedule = model, task, schedule
        self.options, self.world = options, world
        self.optimizer, self.update = optimizer, Update(optimizer)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=options.precision == "fp16")
        self.ema = exponential_average(model, options.ema_decay) if options.ema_decay else None
        self.captured = Captured(model) if options.cuda_graphs else None
        self.ddp = self._distribute(model) if world.size > 1 and self.captured is None else None
        self.forward: Any = self.ddp or self.captured or model
        if options.compile:
            self.forward = torch.compile(self.forward)
        self.guard = Guard(model, options.max_bad_steps, world)

    def _distribute(self, model: nn.Module) -> DistributedDataParallel:
        devices = [self.world.device] if self.world.device.type == "cuda" else None
        return DistributedDataParallel(
            model,
            devices,
            broadcast_buffers=False,  # they are when somebody reads them (evaluation, checkpoint), not in every step
            gradient_as_bucket_view=True,
            # DDP reorders its buckets after the first step unless parameters may be unused; from three ranks on a
            # restarted process would therefore add up its first gradients in another order
            find_unused_parameters=torch.are_deterministic_algorithms_enabled(),
        )

    def _capture_and_distribute(self, captured: Captured, batch: Any) -> DistributedDataParallel:
        """In this order: DDP's hooks hold on to streams that a capture may not use."""
        with autocast(self.world.device, self.options.precision), self._enough_for_batchnorm():
            captured.capture(batch.images)
        return self._distribute(captured)

    def step(self, step: int, batches: Iterable[Batch], count: int, samples: float) -> tuple[Tensor, Tensor]:
        """One optimizer step on the mean loss over the global batch, however many ranks and micro-batches share it.

        Args:
            step: its number, which decides the learning rate.
            batches: this rank's `count` micro-batches.
            samples: this rank's share of the global batch.

        Returns:
            This rank's summed loss and after it the sums of the task's parts of it, (1 + P,), and whether the step was
            skipped as not finite; both on the device.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(step) * group.get("lr_scale", 1.0)
        totals = torch.zeros(1 + len(self.task.parts), device=self.world.device)
        for i, batch in enumerate(batches, 1):
            if self.captured is not None and self.world.size > 1 and self.ddp is None:
                self.forward = self.ddp = self._capture_and_distribute(self.captured, batch)
            with nullcontext() if i == count or self.ddp is None else self.ddp.no_sync():
                with autocast(self.world.device, self.options.precision), self._enough_for_batchnorm():
                    loss, parts = self._loss(batch)
                # ranks average gradients of what is here a sum, hence / samples; the seed is 1, but NaN where the loss
                # is not finite, so that every rank finds the step bad from the gradients alone
                self.scaler.scale(loss / samples).backward(1 + 0 * loss.detach())
            if self.captured is not None and i == 1:
                self._keep_gradients(count)
            totals += parts
        bad = self._update()
        self.guard.record(bad, totals[0] / samples)
        if self.ema is not None:
            self.ema.update(self.model, step + 1)
        return totals, bad

    def _keep_gradients(self, count: int) -> None:
        """A replay's gradients lie where the next replay writes, and two parameters may have the same."""
        having = [p for p in self.parameters if p.grad is not None]
        if count > 1 or len({p.grad.data_ptr() for p in having}) < len(having):  # type: ignore[union-attr]
            for parameter in having:
                parameter.grad = parameter.grad.clone()  # type: ignore[union-attr]

    def _loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch to differentiate, and it together with its parts (1 + P,) to add up."""
        loss = self.task.loss(self.forward, batch)
        if isinstance(loss, Tensor):
            return loss, loss.detach()[None]
        parts = torch.stack([loss[name].float() for name in self.task.parts])
        return parts.sum(), torch.cat([parts.detach().sum()[None], parts.detach()])

    @contextmanager
    def _enough_for_batchnorm(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # a ValueError, which torch.compile wraps into others
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                f"BatchNorm learns nothing from a single value: train.batch_size={self.options.batch_size} leaves "
                "it one pixel of one image. Take more images at a time, or larger ones (data.train_size)"
            ) from error

    def _update(self) -> Tensor:
        """Apply the gradients unless they are not finite, found and obeyed on the device; returns whether."""
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if self.options.clip_grad_norm:
            clip_grads_with_norm_(self.parameters, self.options.clip_grad_norm, norm)
        bad = ~torch.isfinite(norm)  # of the gradients' sum over ranks, so all of them see the same
        self.update(bad)
        self.optimizer.zero_grad()
        self.scaler.update()
        return bad

    def state_dict(self) -> State:
        """All that the next step depends on. A collective call."""
        broadcast_buffers(self.model)
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from `state`; what the configuration says of the optimizer has precedence over what was saved.

        Raises:
            UserError: when the state is that of another model or optimizer.
        """
        load_weights(self.model, state["model"])
        if self.ema is not None:
            if state["ema"] is None:
                raise UserError("train.ema_decay is set, but the checkpoint to resume has no average of the weights")
            self.ema.load_state_dict({k: v for k, v in state["ema"].items() if k != "n_averaged"})  # of earlier code
        # the learning rate is the last step's, in both: one that is resumed for its evaluation alone saves it again
        own = ("params", "lr")
        configured = [{k: v for k, v in group.items() if k not in own} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for parameter, kept in self.optimizer.state.items():  # fused optimizers go through memory as it lies
            for key, value in kept.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    kept[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        for group, values in zip(self.optimizer.param_groups, configured, strict=True):
            group.update(values)
        self.scaler.load_state_dict(state["scaler"] or self.scaler.state_dict())
        self.guard.load_state_dict(state["guard"])
