"""The fused operator for backends without one: span convolution, then involution, the kernels living only that long.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

ALIGNED = 8  # channels: an operand's row of tensor cores begins at 16 bytes


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
    return grad_input, *span_gradients(grad_kernel.flatten(1, 3), reduced, weight, bias)


def span_gradients(
    grad_kernel: Tensor, reduced: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of reduced, weight and bias from the kernels' (B, at least G*K*K, Ho, Wo); further channels are zeros.

    The bias' is a sum over pixels, the weight's at a hidden channel of ones: it costs no further pass over the kernels.
    """
    taps, hidden = weight.shape[:2]
    ones = 0 if bias is None else ALIGNED
    if ones:
        reduced = F.pad(reduced, (0, 0, 0, 0, 0, ones), value=1.0)
    weight = F.pad(weight, (0, 0, 0, 0, 0, ones, 0, grad_kernel.shape[1] - taps))
    grad_reduced, grad_weight, _ = torch.ops.aten.convolution_backward(
        grad_kernel,
        reduced,
        weight,
        None,
        [1, 1],
        [0, 0],
        [1, 1],
        False,
        [0, 0],
        1,
        [True, True, False],
    )
    grad_bias = None if bias is None else grad_weight[:taps, hidden, 0, 0].clone()
    return grad_reduced[:, :hidden], grad_weight[:taps, :hidden], grad_bias
