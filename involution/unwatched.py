"""Whether modules may run as one operator: each is exactly what it seems, and nobody has a say in how it runs.

Hooks, pruning, adapters, parametrisations, observers, wrappers and subclasses work on modules that are called;
counters, compilers, exporters, function transforms watch the calls. Every road that does not call a module asks here.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from involution.ops import transforms
from involution.ops.ghost import GhostBatchNorm2d

_CALL = nn.Module.__call__
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_RUN_BY = ("forward", "__call__", "_call_impl", "_compiled_call_impl", "_conv_forward")


def as_it_seems(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling ``module`` runs the forward of ``kind``, on its own parameters and buffers, and nothing else."""
    return type(module) is kind and _as_written(kind) and unchanged(module)


def is_batch_norm(module: nn.Module) -> TypeGuard[nn.BatchNorm2d]:
    """Whether it is one that ``ops/norm.py`` knows, and as it seems."""
    return as_it_seems(module, nn.BatchNorm2d) or as_it_seems(module, GhostBatchNorm2d)


def unchanged(module: nn.Module) -> bool:
    """No hooks, no wrapped call, and plain parameters and buffers: no pruning, no weight norm, no functional_call."""
    own = module.__dict__
    return (
        type(module).__call__ is _CALL
        and not any(own[name] for name in _HOOKS)
        and not any(name in own for name in _RUN_BY)
        and all(p is None or type(p) is nn.Parameter for p in own["_parameters"].values())
        and all(b is None or type(b) is Tensor for b in own["_buffers"].values())
    )


def _as_written(kind: type[nn.Module]) -> bool:
    """Whether nobody has put another ``forward`` into the class: it comes from the class's own module."""
    return getattr(kind.forward, "__globals__", {}).get("__name__") == kind.__module__


def calls_are_free() -> bool:
    """Whether no hook of all modules, no tracer and no profiler that replaces functions is to see the calls."""
    return _functions() == _AS_IMPORTED and not _has_any_global_hook()


def _functions() -> tuple[object, ...]:
    """What profilers and counters replace."""
    called = nn.Module.__call__, nn.Module._call_impl, nn.Conv2d._conv_forward
    return *called, F.conv2d, F.batch_norm, F.relu, F.avg_pool2d


_AS_IMPORTED = _functions()


def nobody_watches() -> bool:
    """Whether operators may run together that someone could want to see, keep or transform one by one: compilers,
    tracers, function transforms, modes, hooks of all modules, activation checkpointing."""
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or not calls_are_free()
        or torch._C._len_torch_dispatch_stack()
        or any(type(mode) is not DeviceContext for mode in _get_current_function_mode_stack())
        or transforms.active()
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
    )
