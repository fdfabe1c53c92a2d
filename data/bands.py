"""Pictures of any number of channels: multi-spectral TIFF files, and what Pillow reads with as many (RGBA, for one).

Shape legend: H x W pixels, C channels. Values are float32 in units of 8 bits: 8-bit files as they are, 16-bit ones
divided by 257, those of files in floating point, which count in [0, 1], times 255.
"""

import io

import numpy as np
import tifffile
import torch
from PIL import Image
from torch.nn import functional as F

from data.decode import MAX_PIXELS, BadImageError, check_pixels, decode

BY_PILLOW = (1, 3)  # channels that any picture can be given
TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # how such files begin; the last two are BigTIFF's
_FULL = {"uint8": 1, "uint16": 257}  # a file's value that is one of ours


def decode_channels(data: bytes, path: str, channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image | torch.Tensor:
    """Bytes of a picture -> it in RGB for a model of 1 or 3 channels, or its bands (H, W, C) for one of others.

    Raises:
        BadImageError: naming `path`, for a file that cannot be read so.
    """
    if channels in BY_PILLOW:
        return decode(data, path, max_pixels)
    return decode_bands(data, path, channels, max_pixels)


def decode_bands(data: bytes, path: str, channels: int, max_pixels: int = MAX_PIXELS) -> torch.Tensor:
    """Bytes of a picture of so many channels -> (H, W, C).

    Raises:
        BadImageError: naming `path`, for a file that cannot be read, or has another number of channels.
    """
    if not data:
        raise BadImageError(path, "the file is empty")
    try:
        pixels = _tiff(data, channels, max_pixels) if data.startswith(TIFF) else _by_pillow(data, max_pixels)
        if pixels.shape[2] != channels:
            raise ValueError(f"it has {pixels.shape[2]} channels, and the model takes {channels} (model.in_chans)")
        return torch.from_numpy(_in_8_bits(pixels))
    except Exception as error:  # Pillow's plugins and tifffile raise almost every type
        raise BadImageError(path, str(error) or type(error).__name__) from error


def _tiff(data: bytes, channels: int, max_pixels: int) -> np.ndarray:
    """(H, W, C), whether the bands lie side by side, one after the other, or each in a page of its own."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        axes = series.axes
        if len(axes) == 3 and series.shape[2] == channels != series.shape[0]:
            axes = "YXS"  # an array (H, W, C) that was written as if it were pages of W x C
        if not {"Y", "X"} <= set(axes) or len(axes) > 3:
            raise ValueError(f"its axes are {axes} of {series.shape}, and Y, X and at most one for bands were expected")
        height, width = series.shape[axes.index("Y")], series.shape[axes.index("X")]
        check_pixels(width, height, max_pixels)
        pixels = series.asarray()
    return pixels[..., None] if pixels.ndim == 2 else np.moveaxis(pixels, [axes.index("Y"), axes.index("X")], [0, 1])


def _by_pillow(data: bytes, max_pixels: int) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        check_pixels(image.width, image.height, max_pixels)
        return np.atleast_3d(np.asarray(image))


def _in_8_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ValueError("it has values that are not finite")
        return pixels.astype(np.float32) * 255
    if pixels.dtype.name not in _FULL:
        raise ValueError(f"its values are {pixels.dtype}, and uint8, uint16 or floating point were expected")
    return pixels.astype(np.float32) / np.float32(_FULL[pixels.dtype.name])


def resized(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(h, w, C) -> (H, W, C), bilinear with antialiasing, as torchvision resizes tensors."""
    planes = pixels.permute(2, 0, 1)[None]
    return F.interpolate(planes, (height, width), mode="bilinear", antialias=True)[0].permute(1, 2, 0)
