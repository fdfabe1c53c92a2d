"""Exact evaluation: every sample counted once on any number of ranks, one reduction at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from involution.engine.distributed import World, gather_objects, sum_over_ranks
from involution.engine.task import Task

if TYPE_CHECKING:
    from data import Batch

log = logging.getLogger("involution")
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Automatic mixed precision for fp32 (none) | bf16 | fp16."""
    dtype = PRECISIONS[precision]
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def to_device(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    """The batch on the device, copied beside the computation when it lies in pinned memory."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = batch.images.to(device, non_blocking=True, memory_format=memory_format)
    return batch._replace(images=images, targets=batch.targets.to(device, non_blocking=True))


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    task: Task,
    world: World,
    *,
    samples: int,
    precision: str = "fp32",
    channels_last: bool = True,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Score a model on a data set.

    Args:
        model: on `world.device`; left in the mode (training or not) in which it came.
        loader: this rank's share of the data set.
        samples: size of the whole data set, which the number of counted samples must equal but for `loader.skipped`.
        on_batch: called after every batch; an exception from it ends the evaluation.

    Returns:
        The task's metrics, and "n", the number of samples.
    """
    training = model.training
    model.eval()
    counts: Tensor | None = None
    try:
        for batch in loader:
            batch = to_device(batch, world.device, channels_last)
            with autocast(world.device, precision):
                counts = task.counts(model, batch) + (0 if counts is None else counts)
            on_batch()
    finally:
        model.train(training)
    assert counts is not None, "a loader yields at least one (possibly all padding) batch"
    counts = sum_over_ranks(counts)
    n = round(counts[0].item())
    if n != samples:  # files that data.on_error=skip left out, by whichever rank met them, are accounted for
        left_out = set().union(*gather_objects(set(getattr(loader, "skipped", ()))))
        if n + len(left_out) != samples:
            raise RuntimeError(f"the evaluation counted {n} samples, but the data set has {samples}")
        if world.is_main:
            log.warning("%d of %d files do not decode: the evaluation leaves them out", len(left_out), samples)
    return {**task.metrics(counts), "n": n}
