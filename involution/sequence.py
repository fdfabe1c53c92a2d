"""Layers one after the other, as ``nn.Sequential`` runs them; in training some run together.

A BatchNorm and the ReLU behind it are one operator (``ops/norm.py``), with a residual and on the CPU with that one's
BatchNorm too. On the CPU, next to an involution, the layer behind the two joins them, and what it sees is not kept for
the backward, but made again (``ops/recompute.py``). The numbers are those of the modules. Wherever anybody watches or
changes a module (``unwatched.py``), and on other devices, layouts and types, the modules run one by one.
"""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from involution.layers import Involution2d
from involution.ops import norm, recompute
from involution.unwatched import as_it_seems, is_batch_norm, nobody_watches


def sequence(x: Tensor, *modules: nn.Module) -> Tensor:
    """``modules[-1](... modules[1](modules[0](x)))``."""
    together, i = _may_run_together(), 0
    while i < len(modules):
        first, (second, third) = modules[i], (*modules[i + 1 : i + 3], None, None)[:2]
        if not (together and _norm_and_relu(first, second) and norm.supports(x, first)):
            x, i = first(x), i + 1
            continue
        at_involution = isinstance(third, Involution2d) or (i > 0 and isinstance(modules[i - 1], Involution2d))
        step = _step(third, x) if at_involution and norm.takes(x) else None
        x, i = (norm.norm_relu(x, first), i + 2) if step is None else (recompute.run(x, step, first), i + 3)
    return x


def add_residual(x: Tensor, batch_norm: nn.Module, act: nn.Module, source: Tensor, shortcut: nn.Module) -> Tensor:
    """``act(batch_norm(x) + shortcut(source))``, x and the sum of (B, C, H, W)."""
    shared = batch_norm in shortcut.modules()  # its statistics are to see the branch first
    if shared or not (_may_run_together() and _norm_and_relu(batch_norm, act)):
        return act(batch_norm(x) + shortcut(source))
    layers = list(shortcut) if isinstance(shortcut, nn.Sequential) and as_it_seems(shortcut, nn.Sequential) else []
    *before, last = layers or [shortcut]
    skip = sequence(source, *before)
    if is_batch_norm(last) and norm.supports_both(x, batch_norm, skip, last):
        return norm.norm_relu(x, batch_norm, skip, last)
    skip = last(skip)
    return norm.norm_relu(x, batch_norm, skip) if norm.supports(x, batch_norm, skip) else act(batch_norm(x) + skip)


def _may_run_together() -> bool:
    return torch.is_grad_enabled() and nobody_watches()


def _norm_and_relu(batch_norm: nn.Module, act: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return act is not None and is_batch_norm(batch_norm) and as_it_seems(act, nn.ReLU)


def _step(layer: nn.Module | None, x: Tensor) -> recompute.Step | None:
    """The layer behind BatchNorm and ReLU as part of their operator; None for one that is to be called."""
    if isinstance(layer, Involution2d):
        return layer.training_step(x) if as_it_seems(layer, Involution2d) else None
    if not isinstance(layer, nn.Conv2d) or not as_it_seems(layer, nn.Conv2d):
        return None
    fits = layer.in_channels == x.shape[1] and recompute.computes(x, *layer.parameters())
    if not fits or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return None
    options = recompute.Convolution(layer.stride, layer.padding, layer.dilation, layer.groups)
    return recompute.Step(options, (layer.weight, layer.bias))
