"""Unpack ImageNet-1k's official archives into train/<wnid>/ and val/<wnid>/.

    python scripts/prepare_imagenet.py ARCHIVES ROOT [--workers N]

ARCHIVES is the folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz, ROOT the
folder to fill (160 GB). A class folder appears only when it is whole: after an interruption run it again, and it
goes on with what is missing. Then: python train.py data=imagenet data.root=ROOT
"""

import argparse
import os
import shutil
import sys
import tarfile
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/ is used from the checkout

from data import open_dataset
from data.flat import read_labels

TRAIN, VAL, DEVKIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"


def unpack_class(archive: Path, offset: int, target: Path) -> int:
    """Unpacks the class archive at `offset` inside `archive` into the folder `target`; returns how many images."""
    if target.is_dir():
        return len(os.listdir(target))
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        with open(archive, "rb") as file:
            file.seek(offset)
            with tarfile.open(fileobj=file) as tar:  # ends at the end-of-archive blocks of the class archive
                for member in tar:
                    _write(tar, member, temporary / Path(member.name).name)
        temporary.chmod(0o755)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(os.listdir(target))


def _write(tar: tarfile.TarFile, member: tarfile.TarInfo, target: Path) -> None:
    """Plain files only, and never outside the target: names from an archive are not trusted."""
    source = tar.extractfile(member) if member.isfile() else None
    if source is not None:
        with open(target, "wb") as file:
            shutil.copyfileobj(source, file)


def unpack_train(archive: Path, root: Path, workers: int) -> int:
    """The archive of 1000 class archives -> root/train/<wnid>/; returns the number of classes."""
    (root / "train").mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if member.isfile() and member.name.endswith(".tar")]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(unpack_class, archive, member.offset_data, root / "train" / Path(member.name).stem)
            for member in members
        ]
        images = sum(job.result() for job in tqdm(jobs, desc="train", unit="class"))
    print(f"train: {images} images of {len(members)} classes")
    return len(members)


def unpack_val(archives: Path, root: Path) -> None:
    """The flat archive of validation images -> root/val/<wnid>/, by the development kit's ground truth."""
    if (root / "val").is_dir():
        print("val: there already")
        return
    temporary = Path(tempfile.mkdtemp(dir=root, prefix=".val."))
    try:
        with tarfile.open(archives / VAL) as tar:
            members = [member for member in tar if member.isfile()]
            stems = sorted(Path(member.name).stem for member in members)
            labels = read_labels(archives, stems)
            for member in tqdm(members, desc="val", unit="image"):
                name = Path(member.name).name
                folder = temporary / labels[Path(name).stem]
                folder.mkdir(exist_ok=True)
                _write(tar, member, folder / name)
        classes = len(os.listdir(temporary))
        temporary.chmod(0o755)
        temporary.rename(root / "val")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"val: {len(members)} images of {classes} classes")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", type=Path, help="folder with the three official archives")
    parser.add_argument("root", type=Path, help="where train/ and val/ shall lie")
    parser.add_argument("--workers", type=int, default=4, help="class archives unpacked at a time")
    arguments = parser.parse_args(argv)
    missing = [name for name in (TRAIN, VAL, DEVKIT) if not (arguments.archives / name).is_file()]
    if missing:
        print(
            f"error: {str(arguments.archives)!r} lacks {', '.join(missing)}; they can be downloaded from "
            "https://image-net.org/download-images after registration (ILSVRC2012, tasks 1 and 2)",
            file=sys.stderr,
        )
        return 2
    try:
        unpack_train(arguments.archives / TRAIN, arguments.root, arguments.workers)
        unpack_val(arguments.archives, arguments.root)
        open_dataset("imagenet", arguments.root)  # compares the classes of train and val
    except (ValueError, OSError, tarfile.TarError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
