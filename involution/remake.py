"""A BatchNorm, the ReLU behind it and the layer after that: less time and less memory in training.

On the CPU the first two run as one operator (``ops/norm.py``).

Autograd keeps the input of the BatchNorm and, for the layer, the output of the ReLU. Both have the same size, and one
pass over the first makes the second, so ``norm_act`` keeps the first alone and remakes the second in the backward. The
idea is that of in-place activated BatchNorm (Bulo et al., CVPR 2018); here no inverse is taken and gradients are the
same to the last bit.
"""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import _has_any_global_hook

from involution.ops import norm as fused


def norm_relu(x: Tensor, norm: nn.Module, act: nn.Module, skip: Tensor | None = None) -> Tensor:
    """``act(norm(x))``, or ``act(norm(x) + skip)``, all of (B, C, H, W)."""
    if plain(x, norm, act) and fused.supports(x, cast("nn.BatchNorm2d", norm), skip):
        return fused.norm_relu(x, cast("nn.BatchNorm2d", norm), skip)[0]
    return act(norm(x) if skip is None else norm(x) + skip)


def norm_act(x: Tensor, norm: nn.Module, act: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """``layer(act(norm(x)))``; autograd keeps ``x``, but not ``act(norm(x))``.

    It does so where ``norm`` and ``act`` are a plain BatchNorm and ReLU. Compilers and activation checkpointing decide
    by themselves what to keep, and are left to it.
    """
    if not plain(x, norm, act):
        return layer(act(norm(x)))
    norm = cast("nn.BatchNorm2d", norm)
    if fused.supports(x, norm):
        y, coefficients = fused.norm_relu(x, norm)
        remade, behind = _Remade(y, partial(fused.remake, x.detach(), coefficients)), layer
    else:
        y = norm(x)
        remade, behind = _Remade(y, partial(_again, x.detach(), norm, y.dtype)), lambda y: layer(act(y))
    outer = _running.remade
    _running.remade = (*outer, remade)
    try:
        with saved_tensors_hooks(_pack, _unpack):
            return behind(y)
    finally:
        _running.remade = outer


def plain(x: Tensor, norm: nn.Module, act: nn.Module, *others: nn.Module) -> bool:
    """Whether ``norm`` and ``act`` are BatchNorm and ReLU, and nobody else has a say in what is run and kept: hooks of
    the modules, compilers, activation checkpointing, function transforms, modes that watch operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not torch.is_grad_enabled():
        return False
    if type(norm) is not nn.BatchNorm2d or type(act) is not nn.ReLU:
        return False
    if isinstance(x, torch.fx.Proxy) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    if _has_any_global_hook() or any(_watched(module) for module in (norm, act, *others)):
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is None or hooks[0] is _pack


def _watched(m: nn.Module) -> bool:
    hooks = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return bool(hooks) or "forward" in vars(m)


def _again(x: Tensor, norm: nn.BatchNorm2d, dtype: torch.dtype) -> Tensor:
    mean, var = (None, None) if norm.training else (norm.running_mean, norm.running_var)
    with torch.no_grad():
        return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.training, 0.0, norm.eps).to(dtype).relu_()


class _Remade:
    """Stands for y, or what became of it in place, among the tensors that autograd keeps; made once for all who ask."""

    def __init__(self, y: Tensor, make: Callable[[], Tensor]) -> None:
        self.identity, self.make = _identity(y), make
        self.values: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.values is None:
            self.values = self.make()
        return self.values


class _Running(threading.local):
    """What the layers that are running remake. Hooks do not nest, the innermost alone are called: they look at all."""

    remade: tuple[_Remade, ...] = ()


_running = _Running()


def _identity(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _pack(tensor: Tensor) -> Any:
    identity = _identity(tensor)
    return next((remade for remade in _running.remade if remade.identity == identity), tensor)


def _unpack(kept: Any) -> Tensor:
    return kept.tensor() if isinstance(kept, _Remade) else kept
