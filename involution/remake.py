"""Less memory in training: what a ReLU behind a BatchNorm gives is made again in the backward instead of being kept.

Autograd keeps the input of the BatchNorm and the output of the ReLU, for the layer behind it. Both have the same size,
and one pass over the first makes the second, so the first is enough. The idea is that of in-place activated BatchNorm
(Bulo et al., CVPR 2018); here no inverse is taken and gradients are the same to the last bit.
"""

import threading
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def norm_act(x: Tensor, norm: nn.Module, act: nn.Module, layer: Callable[[Tensor], Tensor]) -> Tensor:
    """``layer(act(norm(x)))``; autograd keeps ``x``, but not ``act(norm(x))``.

    It does so where ``norm`` and ``act`` are a plain BatchNorm and ReLU. Compilers and activation checkpointing decide
    by themselves what to keep, and are left to it.
    """
    if type(norm) is not nn.BatchNorm2d or type(act) is not nn.ReLU or _others_decide(x):
        return layer(act(norm(x)))
    y = norm(x)
    outer = _running.remade
    _running.remade = (*outer, _Remade(x.detach(), y, norm))
    try:
        with saved_tensors_hooks(_pack, _unpack):
            return layer(act(y))
    finally:
        _running.remade = outer


def _others_decide(x: Tensor) -> bool:
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return isinstance(x, torch.fx.Proxy) or (hooks is not None and hooks[0] is not _pack)


class _Remade:
    """Stands for relu(norm(x)) among the tensors that autograd keeps; made once for all who ask."""

    def __init__(self, x: Tensor, y: Tensor, norm: nn.BatchNorm2d) -> None:
        self.x, self.norm, self.dtype = x, norm, y.dtype
        self.identity = _identity(y)
        self.values: Tensor | None = None

    def tensor(self) -> Tensor:
        if self.values is None:
            norm, training = self.norm, self.norm.training
            mean, var = (None, None) if training else (norm.running_mean, norm.running_var)
            with torch.no_grad():
                y = F.batch_norm(self.x, mean, var, norm.weight, norm.bias, training, 0.0, norm.eps)
                self.values = y.to(self.dtype).relu_()
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
