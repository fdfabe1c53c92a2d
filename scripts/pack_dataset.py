"""Pack image folders into tar shards in WebDataset form, for network storage.

    python scripts/pack_dataset.py ROOT OUTPUT [--data imagenet] [--shard-size 1000] [--seed 0]

OUTPUT gets train-000000.tar, ..., val-000000.tar, ... and classes.txt; use it as data.root. A shard holds --shard-size
MB of images in a random order: <key>.jpg as it is on disk, and <key>.cls with the number of its class. A shard appears
under its name only when it is whole; after an interruption remove OUTPUT and start again.
"""

import argparse
import io
import os
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/ is used from the checkout

from data import BadImageError, open_dataset
from data.folder import EXTENSIONS
from data.image_list import ImageList
from data.sampling import permutation
from data.shards import CLASSES


def pack(images: ImageList, output: Path, split: str, shard_bytes: int, seed: int) -> int:
    """Writes the shards of a split; returns how many.

    Raises:
        BadImageError: a file cannot be read; nothing is left out silently.
    """
    order = iter(tqdm(permutation(seed, 0, len(images)).tolist(), desc=split, unit="image"))
    number, index = 0, next(order, None)
    while index is not None:
        target = output / f"{split}-{number:06d}.tar"
        temporary = target.with_suffix(".tmp")
        with tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            size = 0
            while index is not None and size < shard_bytes:
                data = images.read(index)
                key = f"{index:09d}"  # of the sorted list; names may have dots, which end a key
                ending = Path(images.paths[index]).suffix.lower()  # rows of a parquet file may have no names
                _add(tar, key + (ending if ending.encode() in EXTENSIONS else ".jpg"), data)
                _add(tar, key + ".cls", b"%d" % images.targets[index])
                size += len(data)
                index = next(order, None)
        os.replace(temporary, target)
        number += 1
    return number


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o644
    tar.addfile(member, io.BytesIO(data))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder with train/ and val/")
    parser.add_argument("output", type=Path, help="an empty or new folder")
    parser.add_argument("--data", default="folder", help="imagenet, imagenette, cifar10 or folder (default)")
    parser.add_argument("--shard-size", type=float, default=1000, help="MB of images in a shard")
    parser.add_argument("--seed", type=int, default=0, help="of the order in the shards")
    arguments = parser.parse_args(argv)
    if not arguments.shard_size > 0:
        parser.error(f"--shard-size is {arguments.shard_size:g}; it should be a number of MB above 0")
    output = arguments.output
    try:
        if output.is_dir() and any(output.iterdir()):
            raise ValueError(f"{str(output)!r} has something in it; give a new or an empty folder")
        splits = open_dataset(arguments.data, arguments.root)
        odd = [name for name in splits.train.class_names if "\n" in name or name.endswith("\r")]
        if odd:
            raise ValueError(
                f"the name of class {odd[0]!r} has a line end, which {CLASSES} cannot keep; rename its folder"
            )
        output.mkdir(parents=True, exist_ok=True)
        names = "".join(f"{name}\n" for name in splits.train.class_names)
        (output / CLASSES).write_bytes(names.encode("utf-8", "surrogateescape"))
        for split, images in zip(splits._fields, splits, strict=True):
            count = pack(images, output, split, int(arguments.shard_size * 1e6), arguments.seed)
            print(f"{split}: {len(images)} images in {count} shards")
    except (BadImageError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
