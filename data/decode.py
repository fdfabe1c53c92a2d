"""Encoded bytes -> picture, as Pillow's `Image.open(...).convert("RGB")` does it (the Exif orientation is ignored)."""

import io

from PIL import Image, UnidentifiedImageError

ADVICE = "run scripts/check_dataset.py to find all such files and exclude them, or set data.on_error=skip"
#: the pixels that a picture may have: Pillow's own limit against small files that unpack to gigabytes
MAX_PIXELS = 2 * (1024**3 // 12)
Image.MAX_IMAGE_PIXELS = None  # for `decode` counts itself, by a limit that can be chosen


class BadImageError(ValueError):
    """A file of the data set that cannot be read as an image.

    Attributes:
        path: of the file (for shards "shard.tar/member").
        reason: what the operating system or Pillow said.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"cannot read image {path!r}: {reason}; {ADVICE}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def decode(data: bytes, path: str, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Bytes of an image file -> RGB picture.

    Raises:
        BadImageError: naming `path`, for whatever Pillow finds wrong (its plugins raise almost every exception type).
    """
    if not data:
        raise BadImageError(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image.width, image.height, max_pixels)
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImageError(path, "Pillow cannot identify it as an image") from None
    except Exception as error:
        raise BadImageError(path, str(error) or type(error).__name__) from error


def check_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture that is too large, before it is unpacked.

    Raises:
        ValueError: it has more than `max_pixels`.
    """
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ValueError(f"it has {size}, more than the limit of {max_pixels} (data.max_pixels)")
