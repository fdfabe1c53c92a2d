"""Encoded bytes -> picture: a classifier's as Pillow's `Image.open(...).convert("RGB")` has it, one with boxes or masks
as involution/pictures.py says."""

import io

from PIL import Image, ImageOps, UnidentifiedImageError

from involution.pictures import to_rgb

ADVICE = (
    "data.on_error=skip leaves such files out, and scripts/check_dataset.py finds all that a classifier's data set has"
)
ORIENTATION = 0x0112  # Exif's tag
#: the pixels that a picture may have: Pillow's own limit against small files that unpack to gigabytes
MAX_PIXELS = 2 * (1024**3 // 12)
Image.MAX_IMAGE_PIXELS = None  # for `decode` counts itself, by a limit that can be chosen


class BadImageError(ValueError):
    """A file of the data set that cannot be read as an image.

    Attributes:
        path: of the file (for shards "shard.tar/member").
        reason: what the operating system or Pillow said.
        lost: it was the operating system: there are no bytes to decode.
    """

    def __init__(self, path: str, reason: str, lost: bool = False) -> None:
        super().__init__(f"cannot read image {path!r}: {reason}; {ADVICE}")
        self.path, self.reason, self.lost = path, reason, lost

    def __reduce__(self) -> tuple[type["BadImageError"], tuple[str, str, bool]]:
        return type(self), (self.path, self.reason, self.lost)


class LostDataError(RuntimeError):
    """File after file cannot be read: the data set, its disk or network is gone, and nothing is to be learned."""

    def __init__(self, last: BadImageError) -> None:
        super().__init__(
            f"file after file cannot be read, the last one {last.path!r}: {last.reason}. That is more than "
            "data.on_error=skip is for: is the data set still there? The run's last checkpoint is intact; start it "
            "again to continue"
        )


def decode(
    data: bytes, path: str, max_pixels: int = MAX_PIXELS, annotated: tuple[int, int] | None = None
) -> Image.Image:
    """Bytes of an image file -> RGB picture.

    Args:
        annotated: width and height to which boxes or masks belong. Where a picture turned as its Exif orientation says
            has this size it is turned, as mmdetection and detectron2 do, and 16 bits are scaled to 8. Without it the
            orientation is ignored, and more than 8 bits are cut off.

    Raises:
        BadImageError: naming `path`, for whatever Pillow finds wrong (its plugins raise almost every exception type).
    """
    if not data:
        raise BadImageError(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            check_pixels(image.width, image.height, max_pixels)
            if annotated is None:
                return image.convert("RGB")
            turned = image.getexif().get(ORIENTATION, 1) != 1 and upright_size(image) == annotated
            return to_rgb(ImageOps.exif_transpose(image) if turned else image)
    except UnidentifiedImageError:
        raise BadImageError(path, "Pillow cannot identify it as an image") from None
    except Exception as error:
        raise BadImageError(path, str(error) or type(error).__name__) from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of a picture, turned as its Exif orientation says."""
    turned = image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def check_pixels(width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Refuse a picture that is too large, before it is unpacked.

    Raises:
        ValueError: it has more than `max_pixels`.
    """
    if width * height > max_pixels:
        size = f"{width} x {height} pixels"
        raise ValueError(f"it has {size}, more than the limit of {max_pixels} (a classifier's data.max_pixels)")
