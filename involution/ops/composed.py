"""The fused operator for backends without one: span convolution, then involution, the kernels living only that long.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def span_kernel(reduced: Tensor, weight: Tensor, bias: Tensor | None, kernel_size: int) -> Tensor:
    """The kernels weight @ reduced + bias: (B, R, Ho, Wo) -> (B, G, K, K, Ho, Wo)."""
    groups = weight.shape[0] // (kernel_size * kernel_size)
    return F.conv2d(reduced, weight, bias).unflatten(1, (groups, kernel_size, kernel_size))


def span_forward(
    backend: ModuleType,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> Tensor:
    """(B, C, Ho, Wo) with the involution of `backend`."""
    kernel = span_kernel(reduced, weight, bias, kernel_size)
    return backend.forward(input, kernel, stride, padding, dilation)


def span_backward(
    backend: ModuleType,
    grad: Tensor,
    input: Tensor,
    reduced: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kernel_size: int,
    stride: int,
    padding: int,
    dilation: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of input, reduced, weight and bias; the kernels are made a second time instead of being stored."""
    kernel = span_kernel(reduced, weight, bias, kernel_size)
    grad_input, grad_kernel = backend.backward(grad, input, kernel, stride, padding, dilation, True, True)
    grad_reduced, grad_weight, grad_bias = torch.ops.aten.convolution_backward(
        grad_kernel.flatten(1, 3),
        reduced,
        weight,
        None if bias is None else bias.shape,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, bias is not None],
    )
    return grad_input, grad_reduced, grad_weight, grad_bias
