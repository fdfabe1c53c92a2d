"""Decode every image of a data set and list the files that cannot be read.

    python scripts/check_dataset.py ROOT [--data imagenet] [--workers N] [--output FILE]

Bad files are printed and written to ROOT/excluded.txt (or FILE, to be given as data.exclude), a path and the reason a
line; training and evaluation leave them out from then on. Without bad files there is no list. An earlier one is kept as
excluded.txt.before.
Exit status: 0 all files can be read, 1 some cannot (the list is written), 2 wrong arguments or folder.
"""

import argparse
import multiprocessing
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/ is used from the checkout

from data import BadImageError, exclusion, open_dataset
from data.bands import decode_channels
from data.datasets import EXCLUDED, folder_of
from data.decode import MAX_PIXELS
from data.image_list import ImageList

CHUNK = 64  # images a task


def _bad(images: ImageList, max_pixels: int, start: int, channels: int = 3) -> list[tuple[str, str]]:
    """(path, reason) of the images of a chunk that cannot be read."""
    warnings.simplefilter("ignore")  # Pillow's warnings are about files that it reads all the same
    found = []
    for index in range(start, min(start + CHUNK, len(images))):
        try:
            decode_channels(images.read(index), images.paths[index], channels, max_pixels)
        except BadImageError as error:
            found.append((error.path, error.reason))
    return found


def scan(
    images: ImageList, workers: int, label: str, max_pixels: int = MAX_PIXELS, channels: int = 3
) -> Iterator[tuple[str, str]]:
    """Decodes all images in `workers` processes; yields (path, reason) of the bad ones, in order."""
    with multiprocessing.Pool(workers) as pool, tqdm(total=len(images), desc=label, unit="image") as bar:
        for found in pool.imap(partial(_bad, images, max_pixels, channels=channels), range(0, len(images), CHUNK)):
            bar.update(min(CHUNK, len(images) - bar.n))
            yield from found
        pool.close()  # they end by themselves: a worker that was started with SIGTERM ignored cannot be terminated
        pool.join()


def write_list(output: Path, bad: list[tuple[str, str]], base: Path) -> None:
    """Writes the exclusion list whole or not at all."""
    lines = [exclusion.line(os.fsencode(os.path.relpath(path, base)), reason) for path, reason in bad]
    handle, temporary = tempfile.mkstemp(dir=output.parent)
    with os.fdopen(handle, "wb") as file:
        file.write(b"\n".join([exclusion.HEADER.encode(), *lines, b""]))
    os.chmod(temporary, 0o644)
    os.replace(temporary, output)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with train/ and val/, or shards")
    parser.add_argument("--data", default="folder", help="imagenet, imagenette, cifar10 or folder (default)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all cores)")
    parser.add_argument("--output", type=Path, help="where to write the list (default: ROOT/excluded.txt)")
    parser.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help="data.max_pixels (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=3, help="model.in_chans: the files' bands (default: 3)")
    arguments = parser.parse_args(argv)
    try:
        base = folder_of(arguments.data, arguments.root)
        output = arguments.output or base / EXCLUDED
        splits = open_dataset(arguments.data, arguments.root, exclude=os.devnull)
        bad = [
            entry
            for label, images in zip(splits._fields, splits, strict=True)
            for entry in scan(images, max(1, arguments.workers), label, arguments.max_pixels, arguments.channels)
        ]
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path, reason in bad:  # before the list is written: the folder may be read-only
        print(f"{path}: {reason}".encode("utf-8", "backslashreplace").decode())
    print(f"{len(bad)} of {sum(len(images) for images in splits)} images cannot be read", end="")
    try:
        if output.is_file():  # lists are edited by hand too
            os.replace(output, output.with_name(f"{output.name}.before"))
        if bad:
            write_list(output, bad, base)
    except OSError as error:
        print(flush=True)
        print(
            f"error: {output} cannot be written or removed: {error.strerror}; choose another place by --output FILE "
            "and give it to training as data.exclude=FILE",
            file=sys.stderr,
        )
        return 2
    print(f"; they are listed in {output}" if bad else "")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
