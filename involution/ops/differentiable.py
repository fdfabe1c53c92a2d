"""Second and higher derivatives of the operators that compute their first in one piece.

Their backwards ask ``again()``; if so they write down what they stand for in operators that can be differentiated any
number of times, and differentiate that.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from . import composed, transforms


def again() -> bool:
    """Whether the backward that runs is to be differentiated itself (``create_graph``). Compilers trace backwards with
    gradients on, but want the operators."""
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
    aliases = [t.view_as(t) if t is not None and t.requires_grad else t for t in inputs]
    wanted = [t for t in aliases if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(function(*aliases), wanted, grad, create_graph=True))
    return [next(found) if t is not None and t.requires_grad else None for t in aliases]
