"""Algorithm 1 of the paper, word for word: unfold, multiply, add up. Slow and K*K times the input in memory; it is what
every other backend is tested against, and it consists of standard differentiable operators only.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def involution2d(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """input (B, C, H, W), kernel (B, G, K, K, Ho, Wo) -> (B, C, Ho, Wo); 16-bit types are added up in float32."""
    batch, groups, size, _, height, width = kernel.shape
    channels = input.shape[1]
    wide = torch.promote_types(input.dtype, torch.float32)
    columns = F.unfold(input.to(wide), size, dilation=dilation, padding=padding, stride=stride)
    columns = columns.view(batch, groups, channels // groups, size * size, height, width)
    weights = kernel.to(wide).reshape(batch, groups, 1, size * size, height, width)
    return (columns * weights).sum(dim=3).view(batch, channels, height, width).to(input.dtype)


def unsupported(input: Tensor, kernel: Tensor) -> str | None:
    """The reference takes every device and type."""
    return None


def forward(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """The backend form of `involution2d`."""
    return involution2d(input, kernel, stride, padding, dilation)


def backward(
    grad: Tensor,
    input: Tensor,
    kernel: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    needs_input: bool,
    needs_kernel: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The two products of Algorithm 1 turned round; autograd through `involution2d` gives the same."""
    batch, groups, size, _, height, width = kernel.shape
    wide = torch.promote_types(input.dtype, torch.float32)
    options = {"dilation": dilation, "padding": padding, "stride": stride}
    grads = grad.to(wide).reshape(batch, groups, -1, 1, height, width)
    grad_input = grad_kernel = None
    if needs_input:
        columns = grads * kernel.to(wide).reshape(batch, groups, 1, size * size, height, width)
        columns = columns.reshape(batch, -1, height * width)
        grad_input = F.fold(columns, input.shape[2:], size, **options).to(input.dtype)
    if needs_kernel:
        columns = F.unfold(input.to(wide), size, **options)
        columns = columns.view(batch, groups, -1, size * size, height, width)
        grad_kernel = (columns * grads).sum(dim=2).view(kernel.shape).to(kernel.dtype)
    return grad_input, grad_kernel
