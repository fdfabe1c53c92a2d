"""RoIAlign (He et al., Mask R-CNN, ICCV 2017) from a pyramid's levels: torchvision's, on all cores of a CPU."""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

from involution.dense.backbone import STRIDES
from involution.unwatched import nobody_watches


class RoIAlign(nn.Module):
    """Pools boxes from the level of their size; by default half-pixel aligned, as many samples as a box has pixels.

    The levels' strides are fixed; torchvision infers them from its first images and keeps them, wrong ones for small
    images.

    Args:
        size: of what comes out, in pixels.
        samples: of a pixel that comes out, along a side; 0: as many as there are pixels below it.
    """

    def __init__(self, size: int, aligned: bool = True, samples: int = 0) -> None:
        super().__init__()
        self.size, self.aligned, self.samples = size, aligned, samples
        self.level_of = LevelMapper(2, 5)

    def forward(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> Tensor:
        """Levels P2, P3, ... by name, and for each image its boxes (N_i, 4) -> (sum of N_i, C, size, size)."""
        levels = list(features.values())
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])
        level = self.level_of(boxes)
        order = [torch.where(level == i)[0] for i in range(len(STRIDES))]
        pooled = [self._pool(levels[i], rois[here], 1 / STRIDES[i]) for i, here in enumerate(order)]
        return torch.cat(pooled).index_select(0, torch.cat(order).argsort())

    def _pool(self, x: Tensor, rois: Tensor, scale: float) -> Tensor:
        """Maps (B, C, H, W), boxes (N, 5) with their image in front -> (N, C, size, size)."""
        dtype = torch.promote_types(x.dtype, torch.float32)  # as under autocast: there is no bfloat16
        wide, rois = x.to(dtype), rois.to(dtype)
        if x.device.type == "cpu" and nobody_watches() and (threads := torch.get_num_threads()) > 1:
            options = scale, self.size, self.size, self.samples, self.aligned
            pooled = _OnAllCores.apply(wide, rois, options, threads)
        else:
            pooled = roi_align(wide, rois, (self.size, self.size), scale, self.samples, self.aligned)
        return pooled.to(x.dtype)  # type: ignore[no-any-return]


class _OnAllCores(torch.autograd.Function):
    """torchvision's operator, which runs on one core: on each one for a share of the channels, to the same bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, options: tuple[Any, ...], threads: int) -> Tensor:
        ctx.save_for_backward(rois)
        ctx.shape, ctx.options, ctx.threads = x.shape, options, threads
        return _by_channels(lambda share: torch.ops.torchvision.roi_align(share, rois, *options), x, threads)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (rois,) = ctx.saved_tensors
        scale, *size, samples, aligned = ctx.options
        batch, _, *map_size = ctx.shape
        align = torch.ops.torchvision._roi_align_backward

        def share_of(g: Tensor) -> Tensor:
            return align(g, rois, scale, *size, batch, g.shape[1], *map_size, samples, aligned)  # type: ignore[no-any-return]

        return _by_channels(share_of, grad, ctx.threads), None, None, None


def _by_channels(function: Callable[[Tensor], Tensor], x: Tensor, threads: int) -> Tensor:
    """``function`` of shares of the channels of ``x``, each in a thread of its own."""

    def alone(share: Tensor) -> Tensor:
        with torch.no_grad():  # of this thread
            return function(share.contiguous())

    return torch.cat(list(_pool_of(threads).map(alone, x.chunk(threads, 1))), 1)


@cache
def _pool_of(threads: int) -> ThreadPoolExecutor:
    """Threads whose own torch operators run on one core each.

    Other threads whose first torch operator falls into the making of the pool, a fraction of a millisecond, do too.
    """
    pool = ThreadPoolExecutor(threads, "roi-align", torch.set_num_threads, (1,))
    all_are_there = Barrier(threads)
    list(pool.map(lambda _: all_are_there.wait(), range(threads)))
    torch.set_num_threads(threads)  # for threads yet to come, which would have taken over theirs
    return pool
