"""The operators in standard ones, for exporters.

K row-shifted copies, then a loop over the K columns: few nodes in an exported graph, K copies of the input in memory.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def exporting() -> bool:
    """Whether the program that runs is being written down for elsewhere, where our operators do not exist.

    The flag itself: to torch 2.11's compiler, `torch.compiler.is_exporting()` is true in everything that it compiles.
    """
    return torch.compiler._is_exporting_flag or torch.onnx.is_in_onnx_export()


def involution2d(input: Tensor, kernel: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """``torch.ops.involution.involution2d`` in standard operators."""
    groups, size = kernel.shape[1:3]
    wide = torch.promote_types(input.dtype, torch.float32)
    padded = F.pad(input, (padding,) * 4).to(wide).unflatten(1, (groups, 1, -1))
    kernel = kernel.to(wide).unsqueeze(4)  # (B, G, K, K, 1, Ho, Wo)
    seen = _seen_by_taps(size, stride, dilation)
    rows = torch.cat([padded[..., tap, :] for tap in seen], 2)  # (B, G, K, C/G, Ho, W)
    products = [rows[..., tap] * kernel[:, :, :, column] for column, tap in enumerate(seen)]
    return sum(products[1:], products[0]).sum(2).flatten(1, 2).to(input.dtype)


def _seen_by_taps(kernel_size: int, stride: int, dilation: int) -> list[slice]:
    """The rows or columns that each tap sees; counted from the end, so that no arithmetic is exported."""
    reach = dilation * (kernel_size - 1)
    return [slice(i * dilation, (i * dilation - reach) or None, stride) for i in range(kernel_size)]


def neighbourhood_product(
    query: Tensor, key: Tensor, kernel_size: int, groups: int, stride: int, dilation: int
) -> Tensor:
    """``torch.ops.involution.neighbourhood_product`` in standard operators."""
    wide = torch.promote_types(key.dtype, torch.float32)
    padded = F.pad(key, (dilation * (kernel_size - 1) // 2,) * 4).to(wide).unflatten(1, (groups, 1, -1))
    queries = query.to(wide).unflatten(1, (groups, 1, -1))
    seen = _seen_by_taps(kernel_size, stride, dilation)
    rows = torch.cat([padded[..., tap, :] for tap in seen], 2)  # (B, G, K, C/G, Ho, W)
    return torch.stack([(rows[..., tap] * queries).sum(3) for tap in seen], 3).to(query.dtype)
