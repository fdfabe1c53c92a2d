"""From a list of images to one batch, on the model's device: resizing, normalisation, padding."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from involution.checks import check_positive

DIVISOR = 32  # heights and widths of a batch are multiples of it


class Images(NamedTuple):
    """A padded batch; boxes of image i are multiplied by ``scales[i]`` (x, y, x, y) to be boxes of the batch."""

    tensors: Tensor  # (B, 3, H, W) float32, zeros below and right of an image
    image_sizes: list[tuple[int, int]]  # height and width of the images in it
    original_sizes: list[tuple[int, int]]
    scales: Tensor  # (B, 4)


class Preparation(nn.Module):
    """Resizes, normalises and pads.

    Args:
        min_size, max_size: pixels. The short side becomes ``min_size``, or less, so that the long one is at most
            ``max_size``. The released models' are 800 and 1333.
        image_mean, image_std: of the channels, in [0, 1].
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, min_size: int, max_size: int, image_mean: Sequence[float], image_std: Sequence[float]) -> None:
        super().__init__()
        check_positive(min_size=min_size, max_size=max_size)
        if max_size < min_size:
            raise ValueError(f"max_size is {max_size}; it should be at least min_size = {min_size}")
        self.min_size, self.max_size = min_size, max_size
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if len(values) != 3:
                raise ValueError(f"{name} is {list(values)}; it should have a value for each of three channels")
            self.register_buffer(name, torch.tensor(list(values), dtype=torch.float32)[:, None, None], persistent=False)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that an image gets."""
        scale = min(self.min_size / min(height, width), self.max_size / max(height, width))
        return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))

    def forward(self, images: Sequence[Tensor]) -> Images:
        """Images (3, H, W), of uint8 or of floats in [0, 1], on any device."""
        if len(images) == 0:
            raise ValueError("there are no images; a batch should have one at least")
        resized, original, device = [], [], self.image_mean.device
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or image.numel() == 0:
                raise ValueError(f"an image is of shape {tuple(image.shape)}; it should be (3, H, W)")
            original.append((image.shape[1], image.shape[2]))
            x = image.to(device, non_blocking=True)
            x = x.float() if x.is_floating_point() else x.float() / 255
            size = self.size(*original[-1])
            if size != original[-1]:
                x = F.interpolate(x[None], size=size, mode="bilinear", align_corners=False)[0]
            resized.append((x - self.image_mean) / self.image_std)
        sizes = [(x.shape[1], x.shape[2]) for x in resized]
        height, width = (-(-max(side) // DIVISOR) * DIVISOR for side in zip(*sizes, strict=True))
        batch = torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in resized])
        scales = [(w / ow, h / oh) * 2 for (h, w), (oh, ow) in zip(sizes, original, strict=True)]
        batch = batch.contiguous(memory_format=torch.channels_last)
        return Images(batch, sizes, original, torch.tensor(scales, dtype=torch.float32, device=device))
