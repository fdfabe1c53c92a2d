"""Encoded bytes -> picture, as Pillow's `Image.open(...).convert("RGB")` does it (the Exif orientation is ignored)."""

import io
import struct

from PIL import Image, UnidentifiedImageError

ADVICE = "run scripts/check_dataset.py to find all such files and exclude them, or set data.on_error=skip"
_TAIL = 64  # bytes at the end in which a complete file shows its end marker


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


def decode(data: bytes, path: str) -> Image.Image:
    """Bytes of an image file -> RGB picture.

    Raises:
        BadImageError: naming `path`, for whatever Pillow finds wrong (its plugins raise almost every exception type).
    """
    if not data:
        raise BadImageError(path, "the file is empty")
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.convert("RGB")
    except UnidentifiedImageError:
        raise BadImageError(path, "Pillow cannot identify it as an image") from None
    except Exception as error:
        raise BadImageError(path, str(error) or type(error).__name__) from error


def plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) of a complete 8-bit grey or RGB JPEG or PNG, read from its header.

    None for everything else (CMYK, palettes, 16 bits, other formats, files without their end): those are rare and go
    through Pillow, which decodes them as the reference does or says what is wrong.
    """
    try:
        if data[:3] == b"\xff\xd8\xff" and b"\xff\xd9" in data[-_TAIL:]:
            return _jpeg_size(data)
        if data[:8] == b"\x89PNG\r\n\x1a\n" and b"IEND" in data[-_TAIL:]:
            width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
            return (height, width) if depth == 8 and colour in (0, 2) and height and width else None
    except (struct.error, IndexError):
        pass
    return None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    position = 2
    while True:
        while data[position] == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
        marker = data[position]
        length, depth, height, width, components = struct.unpack_from(">HBHHB", data, position + 1)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            usual = marker <= 0xC2 and depth == 8 and components in (1, 3) and height and width
            return (height, width) if usual else None
        if marker == 0xDA or data[position + 1 + length] != 0xFF:
            return None
        position += 1 + length
