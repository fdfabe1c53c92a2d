"""Second and higher derivatives of the operators that compute their first in one piece, and what they keep for it.

Their backwards ask ``again()``; if so they write down what they stand for in operators that can be differentiated any
number of times, and differentiate that.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import composed, transforms


def keep(ctx: Any, *tensors: Tensor | None) -> None:
    """Save them for the backward, where ``kept`` gives them back."""
    ctx.save_for_backward(*tensors)
    ctx.kinds = _kinds(tensors)


def kept(ctx: Any) -> tuple[Any, ...]:
    """What was saved, tensors or None.

    Their memory is read by C++: parameters that have been given other data (``model.half()``, ``p.data = ...``) since,
    which autograd does not see, are an error.
    """
    tensors: tuple[Tensor | None, ...] = ctx.saved_tensors
    if _kinds(tensors) != ctx.kinds:
        raise RuntimeError("a parameter has another type, size or device than in the forward whose backward this is")
    return tensors


def _kinds(tensors: tuple[Tensor | None, ...]) -> list[Any]:
    return [None if t is None else (t.dtype, t.shape, t.device) for t in tensors]


def again(grad: Tensor) -> bool:
    """Whether the backward that runs is to be differentiated itself (``create_graph``), or is one for several gradients
    at once (``is_grads_batched``). Compilers trace backwards with gradients on, but want the operators."""
    functorch = torch._C._functorch
    if functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad):
        return True
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch._C._len_torch_dispatch_stack()


def span_involution2d(
    input: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[int, int, int, int]
) -> Tensor:
    """The fused operator by the plain one; options: K, stride, padding, dilation."""
    size, *window = options
    return transforms.apply("involution2d", input, composed.span_kernel(reduced, weight, bias, size), *window)


def gradients(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor | None) -> list[Tensor | None]:
    """The gradients of ``inputs`` for that of ``function(*inputs)``, with graphs of their own; None if not needed.

    They are taken at aliases: an input may be a function of another, which is not this operator's to differentiate.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
        wanted = [t for t in aliases if t is not None and t.requires_grad]
        results = torch.autograd.grad(function(*aliases), wanted, grad, create_graph=create_graph) if wanted else ()
        found = iter(results)
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]
