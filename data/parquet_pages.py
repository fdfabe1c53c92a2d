"""Where values lie in a column chunk of a parquet file, so that one of them can be read without the other megabytes.

Hugging Face writes a hundred pictures into a chunk, as pages compressed with Snappy. Snappy compresses every 64 KiB of
its input by themselves: what a picture lies in can be cut out of a page and unpacked alone. Nothing is assumed: the
copies of every block are seen to stay inside of it, and every value is found where it is said to lie. Chunks that are
laid out or compressed in another way have no places.

Format: https://parquet.apache.org/docs/file-format/, https://github.com/google/snappy/blob/main/format_description.txt
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

BLOCK = 1 << 16  # bytes that Snappy compresses at a time
_DICTIONARY, _DATA = 2, 0  # page types


class Place(NamedTuple):
    """A value: `size` bytes after the first `skip` of what `stored` bytes at `offset` of the chunk unpack to.

    `unpacked` is the size of all that, 0 where the bytes are stored as they are. `stored` is 0 without a place.
    """

    offset: int = 0
    stored: int = 0
    unpacked: int = 0
    skip: int = 0
    size: int = 0


def places(chunk: bytes, codec: str, values: Sequence[bytes | None]) -> list[Place]:
    """The places of a chunk's values, which are in the order of its rows."""
    found = [Place()] * len(values)
    if codec not in ("UNCOMPRESSED", "SNAPPY"):
        return found
    row = 0
    for start, page in _pages(chunk):
        blocks = _blocks(page) if codec == "SNAPPY" else [0]
        if blocks is None:
            return found
        raw = unpack(page, _varint(page, 0)[0]) if codec == "SNAPPY" else page
        position = 0
        while row < len(values):
            value = values[row]
            if value:
                at = _find(raw, value, position)
                if at < 0:
                    break  # in the next page
                found[row] = _place(start, len(page), len(raw), blocks, at, len(value), codec)
                position = max(position, at + len(value))
            row += 1
    return found


def _find(raw: bytes, value: bytes, position: int) -> int:
    """Almost always 4 bytes after its predecessor, its length between; a dictionary has equal values once."""
    if raw.startswith(value, position + 4):
        return position + 4
    at = raw.find(value, position)
    return at if at >= 0 else raw.find(value, 0, position)


def unpack(stored: bytes, size: int) -> bytes:
    """Unpacks a whole Snappy stream of `size` bytes. Raises pyarrow.ArrowException where it is damaged."""
    import pyarrow

    return pyarrow.decompress(stored, decompressed_size=size, codec="snappy", asbytes=True)


def cut(stored: bytes, place: Place) -> bytes:
    """The value from the bytes at its place."""
    if not place.unpacked:
        return stored
    length, size = b"", place.unpacked
    while size > 127:
        length, size = length + bytes([size & 127 | 128]), size >> 7
    return unpack(length + bytes([size]) + stored, place.unpacked)[place.skip : place.skip + place.size]


def _place(start: int, packed: int, total: int, blocks: list[int], at: int, size: int, codec: str) -> Place:
    if codec == "UNCOMPRESSED":
        return Place(start + at, size, 0, 0, size)
    first, last = at // BLOCK, (at + size - 1) // BLOCK + 1
    end = blocks[last] if last < len(blocks) else packed
    unpacked = min(last * BLOCK, total) - first * BLOCK
    return Place(start + blocks[first], end - blocks[first], unpacked, at - first * BLOCK, size)


def _blocks(stream: bytes) -> list[int] | None:
    """Where the blocks of a Snappy stream begin; None if they need one another."""
    total, at = _varint(stream, 0)
    starts, done, begin = [at], 0, 0
    while done < total:
        tag = stream[at]
        kind, length = tag & 3, (tag >> 2) + 1
        back = 0
        if kind == 0:  # bytes as they are
            extra = max(0, length - 60)  # bytes that hold the length
            if extra:
                length = int.from_bytes(stream[at + 1 : at + 1 + extra], "little") + 1
            at += 1 + extra + length
        elif kind == 1:
            length, back = (tag >> 2 & 7) + 4, tag >> 5 << 8 | stream[at + 1]
            at += 2
        else:
            width = 2 if kind == 2 else 4
            back = int.from_bytes(stream[at + 1 : at + 1 + width], "little")
            at += 1 + width
        done += length
        if back > done - length - begin or done - begin > BLOCK:
            return None
        if done - begin == BLOCK:
            starts.append(at)
            begin = done
    return starts


def _pages(chunk: bytes) -> Iterator[tuple[int, bytes]]:
    """(offset, stored bytes) of the dictionary and of the pages of version 1; others end the search."""
    at = 0
    while at < len(chunk):
        header, at = _struct(chunk, at)
        if header.get(1) not in (_DICTIONARY, _DATA):
            return
        yield at, chunk[at : at + header[3]]
        at += header[3]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number, and where the next thing begins."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def _struct(data: bytes, at: int) -> tuple[dict[int, int], int]:
    """The whole numbers of a Thrift struct (compact protocol) by their field ids, and where the struct ends."""
    fields: dict[int, int] = {}
    number = 0
    while data[at]:
        kind, step = data[at] & 15, data[at] >> 4
        at += 1
        if step:
            number += step
        else:
            number, at = _varint(data, at)
            number = number >> 1 ^ -(number & 1)
        if kind in (4, 5, 6):
            value, at = _varint(data, at)
            fields[number] = value >> 1 ^ -(value & 1)
        elif kind == 8:  # bytes
            length, at = _varint(data, at)
            at += length
        elif kind == 12:
            _, at = _struct(data, at)
        elif kind not in (1, 2):  # true and false have no bytes; page headers have nothing else
            raise IndexError(f"a field of kind {kind} in a page header")
    return fields, at + 1
