"""Exact evaluation: every sample counted once on any number of ranks, one reduction at the end."""

from __future__ import annotations

import functools
import logging
import math
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from involution.engine.distributed import World, gather_objects, progress
from involution.engine.errors import UserError
from involution.engine.tasks import Batch, Evaluation

log = logging.getLogger("involution")
EVAL_BATCH = 64  # samples at once, unless told or the task's own
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Automatic mixed precision for fp32 (none) | bf16 | fp16."""
    dtype = PRECISIONS[precision]
    if device.type == "cpu":
        _warn_once_if_slow(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


@functools.cache  # a step asks
def _warn_once_if_slow(precision: str) -> None:
    if precision == "fp16":
        reason = "on CPUs float16 is converted to float32 and back; bf16 is the fast one where they have AVX512-BF16"
    elif precision == "bf16" and platform.machine() == "x86_64" and not torch.cpu._is_avx512_bf16_supported():
        reason = "this CPU has no instructions for bfloat16 (AVX512-BF16)"
    else:
        return
    log.warning("precision=%s may be slower than fp32: %s", precision, reason)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Batch],
    evaluation: Evaluation,
    world: World,
    *,
    samples: int,
    precision: str = "fp32",
    channels_last: bool = True,
    on_batch: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Score a model on a data set.

    Args:
        model: on `world.device`; left in the mode (training or not) in which it came.
        loader: this rank's share of the data set; at least one batch.
        evaluation: what to find out; a fresh one.
        samples: size of the whole data set, which the number of counted samples must equal but for `loader.skipped`.
        on_batch: called after every batch; an exception from it ends the evaluation.

    Returns:
        The evaluation's results, with "n", the number of samples.
    """
    training = model.training
    model.eval()
    try:
        for batch in loader:
            batch = batch.to(world.device, channels_last=channels_last)
            with autocast(world.device, precision):
                evaluation.add(model, batch)
            progress()
            on_batch()
    finally:
        model.train(training)
    results = evaluation.finish(world)
    if world.is_main and not math.isfinite(results.get("loss", 0.0)):
        log.warning(
            "the loss is not finite: for some samples the model's outputs overflow, and they count as wrong. Early in "
            "training BatchNorm's running statistics may not hold back an unusual picture; otherwise try fp32 or bf16"
        )
    n = results["n"]
    if n != samples:  # files that data.on_error=skip left out, by whichever rank met them, are accounted for
        left_out = set().union(*gather_objects(set(getattr(loader, "skipped", ()))))
        if n + len(left_out) != samples:
            raise RuntimeError(f"the evaluation counted {n} samples, but the data set has {samples}")
        if not n:
            raise UserError(f"none of the {samples} files to evaluate on can be read")
        if world.is_main:
            log.warning("%d of %d files do not decode: the evaluation leaves them out", len(left_out), samples)
    return results
