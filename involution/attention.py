"""Self-attention as kernel generation (Section 4.2): involution kernels made by comparing a pixel with its neighbours.

    Y = involution2d(values, kernel)  with  kernel = softmax over taps of  q . k  (content)  or  q . r  (position)

Shape legend: B batch, C channels, G groups (heads), D channels a head, K kernel size, H W input size, Ho Wo output.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from involution.ops import neighbourhood_product


def window_softmax(scores: Tensor, height: int, width: int, stride: int = 1, dilation: int = 1) -> Tensor:
    """Softmax over the taps of each window, those outside the H x W image left out: (B, G, K, K, Ho, Wo), the same."""
    if has_torch_function((scores,)):  # torch.fx writes the call down: it cannot make masks of a size it does not know
        return handle_torch_function(window_softmax, (scores,), scores, height, width, stride, dilation)
    size = scores.shape[2]
    rows, columns = (_outside(side, size, stride, dilation, scores.device) for side in (height, width))
    outside = rows[:, None, None, :, None] | columns[:, None, None, :]  # (Ho, Wo, 1, K, K)
    taps = scores.permute(0, 4, 5, 1, 2, 3).masked_fill(outside, float("-inf"))
    return taps.flatten(4).softmax(4).unflatten(4, (size, size)).permute(0, 3, 4, 5, 1, 2)


def _outside(side: int, size: int, stride: int, dilation: int, device: torch.device) -> Tensor:
    """(windows, K): whether tap v of window j lies outside 0 ... side - 1, along one axis."""
    taps = dilation * (torch.arange(size, device=device) - size // 2)
    # windows from the image's size: ONNX's older exporter takes those of computed tensors for constants
    place = torch.arange(0, side, stride, device=device)[:, None] + taps
    return (place < 0) | (place >= side)


def position_scores(query: Tensor, table: Tensor, groups: int) -> Tensor:
    """q . r: query (B, G*D, H, W), one embedding a tap in table (D, K, K) -> (B, G, K, K, H, W)."""
    heads = query.unflatten(1, (groups, -1)).permute(0, 3, 4, 1, 2)  # (B, H, W, G, D)
    return (heads @ table.flatten(1)).unflatten(4, table.shape[1:]).permute(0, 3, 4, 5, 1, 2)


class AttentionGeneration(nn.Module):
    """Content attention, kernels = softmax(Q K^T): each query meets the keys of its window, a head a group.

    Query and key have ``channels / reduction_ratio`` channels, as many a group, at least one; no 1/sqrt(D), as in the
    paper's formula. Where ``activation`` is "sigmoid" it stands in the softmax's place.
    """

    def __init__(
        self,
        channels: int,
        groups: int,
        kernel_size: int,
        stride: int,
        dilation: int,
        reduction_ratio: int,
        pool: nn.Module,
        activation: str | None,
    ) -> None:
        super().__init__()
        width = groups * max(1, channels // groups // reduction_ratio)
        self.groups, self.kernel_size, self.stride, self.dilation = groups, kernel_size, stride, dilation
        self.activation = activation
        self.sums_to_one = activation != "sigmoid"
        self.pool = pool
        self.query = nn.Conv2d(channels, width, 1, bias=False)
        self.key = nn.Conv2d(channels, width, 1, bias=False)

    def scores(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
        query, options = self.query(self.pool(x)), {"stride": self.stride, "dilation": self.dilation}
        return neighbourhood_product(query, self.key(x), self.kernel_size, groups=self.groups, **options)

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x)
        if self.activation == "sigmoid":
            return scores.sigmoid().flatten(1, 3)
        return window_softmax(scores, x.shape[2], x.shape[3], self.stride, self.dilation).flatten(1, 3)

    def products(self, x: Tensor, output: Tensor) -> int:
        """Multiply-adds of the scores; the convolutions count themselves."""
        return output.shape[2] * output.shape[3] * self.kernel_size**2 * self.query.out_channels


class PositionGeneration(AttentionGeneration):
    """Position attention, kernels = softmax(Q R^T): R has an embedding for each tap, which the groups share."""

    def __init__(self, channels: int, groups: int, kernel_size: int, *options: object) -> None:
        super().__init__(channels, groups, kernel_size, *options)  # type: ignore[arg-type]
        del self.key
        depth = self.query.out_channels // groups
        self.position = nn.Parameter(torch.randn(depth, kernel_size, kernel_size) * depth**-0.5)

    def scores(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, G, K, K, Ho, Wo)."""
        return position_scores(self.query(self.pool(x)), self.position, self.groups)


class ActivatedGeneration(nn.Module):
    """Another generator with softmax or sigmoid behind it, which costs the paper more than 1 % top-1 (Section 5.2)."""

    def __init__(self, generation: nn.Module, kernel_size: int, activation: str) -> None:
        super().__init__()
        self.generation = generation
        self.kernel_size, self.activation = kernel_size, activation
        self.sums_to_one = activation == "softmax"

    def forward(self, x: Tensor) -> Tensor:
        kernels = self.generation(x)
        if self.activation == "sigmoid":
            return kernels.sigmoid()
        return F.softmax(kernels.unflatten(1, (-1, self.kernel_size**2)), 2).flatten(1, 2)
