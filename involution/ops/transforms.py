"""The bilinear maps under forward-mode differentiation and the transforms of ``torch.func`` (grad, jvp, vmap, ...).

torch gives a custom operator neither: a tangent would be dropped in silence. An ``autograd.Function`` has both, at a
price in Python that ordinary calls need not pay, so ``apply`` takes it only where a transform is active.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def active() -> bool:
    """Whether a transform of torch.func or a level of forward-mode differentiation is; compilers see the operator."""
    if torch.compiler.is_compiling():
        return False
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def apply(name: str, first: Tensor, second: Tensor, *options: int) -> Tensor:
    """The map ``torch.ops.involution.<name>``, see bilinear.py."""
    if active():
        device = first.device.type
        if torch.is_autocast_enabled(device):  # here, for the operator would cast behind the function's back
            dtype = torch.get_autocast_dtype(device)
            first, second = (t if t.dtype == torch.float64 else t.to(dtype) for t in (first, second))
        return _Bilinear.apply(name, first, second, *options)
    return getattr(torch.ops.involution, name)(first, second, *options)


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def forward(name: str, first: Tensor, second: Tensor, *options: int) -> Tensor:
        return getattr(torch.ops.involution, name)(first, second, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.name, first, second, *ctx.options = inputs
        ctx.save_for_backward(first, second)
        ctx.save_for_forward(first, second)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second = ctx.saved_tensors
        options = ctx.options[-3:]  # stride, padding, dilation
        if ctx.name == "involution2d":  # of input and kernel
            groups, size = second.shape[1:3]
            gradients = (
                apply("involution2d_transpose", grad, second, *first.shape[2:], *options),
                apply("neighbourhood_product", grad, first, size, groups, *options),
            )
        elif ctx.name == "involution2d_transpose":  # of an output's gradient and kernel
            groups, size = second.shape[1:3]
            gradients = (
                apply("involution2d", grad, second, *options),
                apply("neighbourhood_product", first, grad, size, groups, *options),
            )
        else:  # of query and key
            gradients = (
                apply("involution2d", second, grad, *options),
                apply("involution2d_transpose", first, grad, *second.shape[2:], *options),
            )
        return None, *gradients, *[None] * len(ctx.options)

    @staticmethod
    def jvp(ctx: Any, _: None, first: Tensor | None, second: Tensor | None, *options: None) -> Tensor:
        """Linear in both: f(x, k)' = f(x', k) + f(x, k')."""
        a, b = ctx.saved_tensors
        parts = [apply(ctx.name, first, b, *ctx.options)] if first is not None else []
        parts += [apply(ctx.name, a, second, *ctx.options)] if second is not None else []
        return parts[0] if len(parts) == 1 else parts[0] + parts[1]

    @staticmethod
    def vmap(
        info: Any, dims: tuple[int | None, ...], name: str, first: Tensor, second: Tensor, *options: int
    ) -> tuple[Tensor, int]:
        """Both operands begin with the batch, which takes the new dimension in."""
        count = info.batch_size

        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            tensor = tensor.expand(count, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
            return tensor.flatten(0, 1)

        out = apply(name, batched(first, dims[1]), batched(second, dims[2]), *options)
        return out.unflatten(0, (count, -1)), 0
