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
    options, groups, size = (stride, padding, dilation), kernel.shape[1], kernel.shape[2]
    grad_input = transpose(grad, kernel, input.shape[2], input.shape[3], *options) if needs_input else None
    return grad_input, product(grad, input, size, groups, *options) if needs_kernel else None


def transpose(
    grad: Tensor, kernel: Tensor, height: int, width: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the input: grad (B, C, Ho, Wo) -> (B, C, height, width)."""
    batch, groups, size, _, *out = kernel.shape
    wide = torch.promote_types(grad.dtype, torch.float32)
    columns = grad.to(wide).reshape(batch, groups, -1, 1, *out) * kernel.to(wide).flatten(2, 3).unsqueeze(2)
    columns = columns.reshape(batch, -1, out[0] * out[1])
    options = {"dilation": dilation, "padding": padding, "stride": stride}
    return F.fold(columns, (height, width), size, **options).to(grad.dtype)


def product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, padding: int, dilation: int
) -> Tensor:
    """The gradient of the kernel: query (B, C, Ho, Wo), key (B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
    batch, _, height, width = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    columns = F.unfold(key.to(wide), kernel_size, dilation=dilation, padding=padding, stride=stride)
    columns = columns.view(batch, groups, -1, kernel_size**2, height, width)
    scores = (columns * query.to(wide).reshape(batch, groups, -1, 1, height, width)).sum(dim=2)
    return scores.unflatten(2, (kernel_size, kernel_size)).to(query.dtype)
