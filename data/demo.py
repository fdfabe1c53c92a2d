"""The embedded data set: scikit-learn's 1797 handwritten digits as an image folder of JPEGs.

It walks the same path as ImageNet (JPEG decoding, random resized crop, DALI) without a download.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from involution.cache import cache_dir, writable_cache_dir
from involution.outage import wait_for_lock

SIZE = 64  # pixels; the digits are 8 x 8
VAL_SHARE = 5  # every fifth image of a class is for validation


def write_once(target: Path, write: Callable[[Path], None]) -> Path:
    """Fills a folder by `write(temporary folder)` and moves it into place whole; one process writes, others wait."""
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / f".{target.name}.lock", "w") as lock:
        wait_for_lock(lock)
        if not target.is_dir():
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
            try:
                write(temporary)
                temporary.chmod(0o755)
                temporary.rename(target)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _write_digits(root: Path) -> None:
    from sklearn.datasets import load_digits  # heavy, and needed only once

    digits = load_digits()
    seen = [0] * 10
    for pixels, digit in zip(digits.images, digits.target, strict=True):
        seen[digit] += 1
        folder = root / ("val" if seen[digit] % VAL_SHARE == 0 else "train") / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
        picture = picture.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        picture.convert("RGB").save(folder / f"{seen[digit]:03d}.jpg", quality=90)


def demo_root(root: str | os.PathLike[str] | None = None) -> Path:
    """Folder with train/<digit> and val/<digit>; written on first use into `root` or the cache folder."""
    target = Path(root) if root else cache_dir() / f"digits-{SIZE}"
    if not root and not target.is_dir():
        target = writable_cache_dir() / target.name
    try:
        return write_once(target, _write_digits)
    except OSError as error:
        raise ValueError(
            f"cannot write the demo data set to {str(target)!r}: {error.strerror}; set INVOLUTION_CACHE"
        ) from None
