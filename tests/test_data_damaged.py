"""Both loaders and the scan agree on which files are images: damaged ones, and ones with too many pixels."""

import random
from pathlib import Path

import pytest
from image_folders import encoded
from PIL import Image

import data
from data.folder import list_folder
from data.image_list import ImageList
from scripts import check_dataset

KINDS = ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"format": "PNG"})


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Flipped bits, a foreign marker, a hole, or zeros."""
    content, start = bytearray(raw), rng.randrange(len(raw) // 3, len(raw) - 2)
    match rng.randrange(4):
        case 0:
            content[start] ^= 1 << rng.randrange(8)
        case 1:
            content[start : start + 2] = bytes([255, rng.randrange(256)])
        case 2:
            del content[start : start + rng.choice([1, 5, 50])]
        case 3:
            content[start : start + 16] = bytes(16)
    return bytes(content)


def write_damaged(root: Path, count: int = 80) -> ImageList:
    """One batch each, for a whole batch takes the way through Pillow when one of its files does not decode."""
    rng, whole = random.Random(0), [encoded(i, 90, **kind) for i, kind in enumerate(KINDS)]
    (root / "c").mkdir(parents=True)
    for i in range(count):
        suffix = "png" if i % len(KINDS) == 3 else "jpg"
        (root / "c" / f"{i:03d}.{suffix}").write_bytes(damaged(whole[i % len(KINDS)], rng))
    checksum = bytearray(whole[3])
    checksum[29] ^= 1  # of the header of a PNG
    (root / "c" / "header.png").write_bytes(checksum)
    return list_folder(root)


def skipped(images: ImageList, loader: str, training: bool, **options) -> set[str]:
    common = {"loader": loader, "batch_size": 1, "workers": 0, "on_error": "skip"} | options
    if training:
        one = data.train_loader(images, global_batch_size=1, seed=0, train_size=16, **common)
        for _ in range(one.plan.batches_per_epoch):
            next(one)
    else:
        one = data.eval_loader(images, val_resize=16, val_size=16, **common)
        list(one)
    one.close()
    return set(one.skipped)


def by_the_scan(images: ImageList, *limit: int) -> set[str]:
    return {path for start in range(0, len(images), 64) for path, _ in check_dataset._bad(images, *limit, start)}


needs_dali = pytest.mark.skipif(not data.dali_installed(), reason="NVIDIA DALI is not installed")


@needs_dali
def test_damaged_files_are_bad_for_both_loaders_and_the_scan(tmp_path):
    images = write_damaged(tmp_path)
    bad = by_the_scan(images, 10**9)
    assert 10 < len(bad) < len(images)
    assert any(path.endswith("header.png") for path in bad)
    for loader in ("torch", "dali"):
        for training in (False, True):
            assert skipped(images, loader, training) == bad, (loader, training)


@pytest.mark.parametrize("loader", ["torch", pytest.param("dali", marks=needs_dali)])
def test_the_limit_of_pixels_is_the_same_and_can_be_chosen(loader, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "small.jpg").write_bytes(encoded(side=20))
    Image.new("RGB", (30, 40)).save(tmp_path / "c" / "large.png")
    Image.new("L", (15000, 12000)).save(tmp_path / "c" / "vast.png", compress_level=1)  # beyond Pillow's own limit
    images = list_folder(tmp_path)
    for limit, names in ((1199, {"large", "vast"}), (1200, {"vast"}), (data.decode.MAX_PIXELS, {"vast"})):
        assert {Path(path).stem for path in skipped(images, loader, False, max_pixels=limit)} == names
        assert {Path(path).stem for path in by_the_scan(images, limit)} == names
    if loader == "torch":
        assert not by_the_scan(images, 2 * 10**8)
    with pytest.raises(data.BadImageError, match=r"15000 x 12000 pixels, more than the limit of .*data\.max_pixels"):
        next(iter(data.eval_loader(images.select([2]), loader=loader, batch_size=1, workers=0)))
