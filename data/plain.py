"""Which files a decoder may take without Pillow: whole and well-formed 8-bit JPEGs and PNGs, told from their parts.

Decoders differ in what they forgive. Pillow is the reference, so whatever is unusual goes through Pillow, which decodes
it or says what is wrong. Looking costs 20 to 60 us a file.
"""

import re
import struct
import zlib

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHUNKS = {b"IDAT", b"IEND", b"IHDR", b"gAMA", b"cHRM", b"sRGB", b"pHYs", b"tIME", b"tEXt", b"bKGD", b"sBIT"}
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_RESTARTS = range(0xD0, 0xD8)
_BETWEEN_SCANS = {0xC4, 0xDA, 0xDB, 0xDD, 0xFE}  # tables, scans, comments
_SOS, _EOI = 0xDA, 0xD9


def plain_size(data: bytes, max_pixels: int) -> tuple[int, int] | None:
    """(height, width) of a whole 8-bit grey or RGB JPEG or PNG without anything unusual; None for all other files.

    Unusual are CMYK, palettes, 16 bits, transparency, more than `max_pixels`, other formats, and every kind of damage
    that can be seen without decoding.
    """
    try:
        size = _jpeg_size(data) if data[:3] == b"\xff\xd8\xff" else _png_size(data) if data[:8] == _PNG else None
    except (struct.error, IndexError):
        return None
    return size if size is not None and 0 < size[0] * size[1] <= max_pixels else None


def _png_size(data: bytes) -> tuple[int, int] | None:
    """Every chunk's checksum is right, and IEND ends the file."""
    position, kinds = 8, []
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind, end = data[position + 4 : position + 8], position + 8 + length
        if kind not in _PNG_CHUNKS or struct.unpack_from(">I", data, end) != (zlib.crc32(data[position + 4 : end]),):
            return None
        kinds.append(kind)
        position = end + 4
    if not kinds or kinds[0] != b"IHDR" or kinds[-1] != b"IEND" or kinds.count(b"IHDR") > 1:
        return None
    width, height, depth, colour = struct.unpack_from(">IIBB", data, 16)
    return (height, width) if depth == 8 and colour in (0, 2) else None


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Segments follow each other without a gap, and between the scans and behind the last there is nothing foreign."""
    position, size, frames, in_header = 2, None, 0, True
    while True:
        if data[position] != 0xFF:
            return None
        while data[position] == 0xFF:  # any number of fill bytes may precede a marker
            position += 1
        marker = data[position]
        if marker == _EOI:
            return size if not in_header and frames == 1 else None
        (length,) = struct.unpack_from(">H", data, position + 1)
        if length < 2 or not (in_header or marker in _BETWEEN_SCANS):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a start of frame
            depth, height, width, components = struct.unpack_from(">BHHB", data, position + 3)
            if marker > 0xC2 or depth != 8 or components not in (1, 3):
                return None
            size, frames = (height, width), frames + 1
        position += 1 + length
        if marker == _SOS:
            in_header, position = False, _end_of_scan(data, position)


def _end_of_scan(data: bytes, position: int) -> int:
    """Where the next marker is that is no restart."""
    for found in _MARKER.finditer(data, position):
        if data[found.start() + 1] not in _RESTARTS:
            return found.start()
    return len(data)
