"""Random erasing (Zhong et al., 2020) on any device, as timm has it ("pixel"): a box of normal noise.

Shapes: b images, C channels, H x W pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from data import sampling
from data.sampling import MicroBatch

CANDIDATES = 10  # boxes that are tried before the picture stays as it is
AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)  # share of the picture; height / width
NOISE = 1 << 18  # numbers of which each box takes as many as it has, from anywhere: drawing all anew would take longer


@lru_cache(maxsize=4)
def _noise(seed: int, count: int, device: torch.device) -> torch.Tensor:
    """(count,) normal numbers, the same for every epoch."""
    u, v = sampling.uniforms(seed, 2**32 - 1, count).reshape(2, -1)
    radius, angle = np.sqrt(-2 * np.log(1 - u)), 2 * np.pi * v
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return torch.from_numpy(normal.astype(np.float32)).to(device)


@dataclass(frozen=True)
class Erasing:
    """Each image loses a box with a `probability`, decided by (seed, epoch, sample)."""

    seed: int
    probability: float

    def box(self, draw: list[float], height: int, width: int) -> tuple[int, int, int, int] | None:
        """(top, left, height, width) from the numbers (2 + 4 CANDIDATES,) of a sample, or none."""
        if draw[0] >= self.probability:
            return None
        low, high = map(math.log, ASPECT)
        for i in range(2, len(draw), 4):
            area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * draw[i])
            aspect = math.exp(low + (high - low) * draw[i + 1])
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < h < height and 0 < w < width:
                return int(draw[i + 2] * (height - h + 1)), int(draw[i + 3] * (width - w + 1)), h, w
        return None

    def apply(self, images: torch.Tensor, request: MicroBatch) -> None:
        """Erase in normalised images (b, C, H, W), in place."""
        _, channels, height, width = images.shape
        noise = _noise(self.seed, max(NOISE, 1 << (channels * height * width).bit_length()), images.device)
        for image, draw in zip(images, request.erasing(self.seed, 2 + 4 * CANDIDATES).tolist(), strict=True):
            box = self.box(draw, height, width)
            if box is not None:
                top, left, h, w = box
                start, count = int(draw[1] * (len(noise) - channels * h * w)), channels * h * w
                image[:, top : top + h, left : left + w] = (
                    noise[start : start + count].view(h, w, channels).permute(2, 0, 1)
                )
