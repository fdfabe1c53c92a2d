"""Parquet files: the same batches as from folders, pictures found in every layout, and messages for what is wrong."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_folders import write
from programs import in_process

import data
from data.image_list import ImageList
from data.parquet import ParquetList
from scripts import check_dataset, pack_dataset

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

CLASSES = ["ant", "bee", "bee"]  # ImageNet has names twice, too
LOADERS = [
    "torch",
    pytest.param("dali", marks=pytest.mark.skipif(not data.dali_installed(), reason="NVIDIA DALI is not installed")),
]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path / "cache"))


def table(pictures: list[bytes | None], labels: list[int | None], names: list[str] | None = None):
    rows = [{"bytes": picture, "path": f"{i}.jpg"} for i, picture in enumerate(pictures)]
    image = pa.array(rows, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    made = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    label = {"names": names, "_type": "ClassLabel"}
    described = {"info": {"features": {"image": {"_type": "Image"}, "label": label}}}
    return made.replace_schema_metadata({"huggingface": json.dumps(described)}) if names else made


def write_parquet(root: Path, images: ImageList, prefix: str) -> None:
    """Two files of row groups of two pictures."""
    root.mkdir(exist_ok=True)
    for file, part in enumerate(np.array_split(np.arange(len(images)), 2)):
        made = table([images.read(i) for i in part], images.targets[part].tolist(), CLASSES)
        pq.write_table(made, root / f"{prefix}-{file:05d}-of-00002.parquet", row_group_size=2)


@pytest.fixture
def roots(tmp_path) -> tuple[Path, Path]:
    """A folder, and parquet files with the same pictures, laid out as in a clone from the Hub."""
    folder = write(tmp_path / "folder")
    splits = data.open_dataset("folder", folder)
    (tmp_path / "parquet").mkdir()
    write_parquet(tmp_path / "parquet/data", splits.train, "train")
    write_parquet(tmp_path / "parquet/data", splits.val, "validation")
    return folder, tmp_path / "parquet"


def training(images: ImageList, loader: str, count: int, state: dict[str, int] | None = None) -> list[data.Batch]:
    made = data.train_loader(
        images, batch_size=2, global_batch_size=2, seed=5, train_size=8, loader=loader, workers=1 if state else 0
    )
    if state:
        made.load_state_dict(state)
    batches = [next(made) for _ in range(count)]
    made.close()
    return batches


@pytest.mark.parametrize("loader", LOADERS)
def test_batches_are_those_of_the_folder(roots, loader):
    folders, parquet = (data.open_dataset("imagenet", root) for root in roots)
    assert isinstance(parquet.train, ParquetList)
    assert parquet.train.class_names == parquet.val.class_names == tuple(CLASSES)
    assert parquet.val.targets.tolist() == folders.val.targets.tolist()
    assert (parquet.train.spans[:, 2] > 0).all()
    expected = training(folders.train, loader, 7)  # nine pictures an epoch
    found = training(parquet.train, loader, 4) + training(parquet.train, loader, 3, {"epoch": 0, "batch": 4})
    for one, other in zip(expected, found, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets, other.targets)
    again = data.open_dataset("imagenet", roots[1]).train
    assert again.fingerprint == parquet.train.fingerprint
    assert np.array_equal(again.spans, parquet.train.spans)


def test_scans_exclusions_and_shards(roots, tmp_path, capsys):
    root = roots[1]
    images = data.open_dataset("imagenet", root).val
    pictures = [images.read(i) for i in range(9)]
    pictures[4] = b"no image"
    (root / "data/validation-00001-of-00002.parquet").unlink()
    (root / "data/validation-00000-of-00002.parquet").unlink()
    pq.write_table(table(pictures, [0, 0, 0, 1, 1, 1, 2, 2, 2], CLASSES), root / "data/val-0.parquet")
    assert check_dataset.main([str(root), "--workers", "1"]) == 1
    assert "data/val-0.parquet/000004-4.jpg: Pillow cannot identify it as an image" in capsys.readouterr().out
    splits = data.open_dataset("folder", root)
    assert [splits.val.read(i) for i in range(8)] == pictures[:4] + pictures[5:]
    assert pack_dataset.main([str(root), str(tmp_path / "shards")]) == 0
    shards = data.open_dataset("folder", tmp_path / "shards")
    assert sorted(shards.train.read(i) for i in range(9)) == sorted(splits.train.read(i) for i in range(9))


LAYOUTS = {
    "dictionary": {},
    "pages": {"use_dictionary": False, "data_page_size": 100_000, "write_batch_size": 2},
    "dictionary, then pages": {"dictionary_pagesize_limit": 100_000, "write_batch_size": 2},
    "chunked by content": {"use_content_defined_chunking": {"min_chunk_size": 30000, "max_chunk_size": 90000}},
    "stored": {"compression": "none"},
    "zstd": {"compression": "zstd"},
    "version 2": {"data_page_version": "2.0", "use_dictionary": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_are_found_in_every_layout(layout, tmp_path, caplog):
    random = np.random.default_rng(0)
    pictures: list[bytes | None] = [random.bytes(int(size)) for size in random.integers(1, 150_000, 12)]
    pictures += [pictures[3], b"", None, b"a" * 70_000 + b"b", bytes(200) * 900, pictures[3]]
    for split in ("train", "val"):
        pq.write_table(table(pictures, [0] * 18), tmp_path / f"{split}-0.parquet", row_group_size=9, **LAYOUTS[layout])
    images = data.open_dataset("folder", tmp_path).train
    assert images.class_names == ("0",)
    assert [images.read(i) for i in range(18) if i != 14] == pictures[:14] + pictures[15:]
    with pytest.raises(data.BadImageError, match="no bytes, at most a path"):
        images.read(14)
    found = int((images.spans[:, 2] > 0).sum())
    assert found == (0 if layout in ("zstd", "version 2") else 16)
    assert images.spans[:12, 2].sum() <= sum(map(len, pictures[:12])) + 12 * 2**17
    assert f"{18 - found} of 18 images" in caplog.text


def test_what_is_wrong_is_said(roots, monkeypatch, tmp_path):
    root = roots[1]
    file = root / "data/train-00001-of-00002.parquet"
    whole = file.read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(ValueError, match=match):
            data.open_dataset("imagenet", root)

    for broken in (whole[:-50], b"version https://git-lfs.github.com/spec/v1\n", b"", b"x" * 300 + whole[300:]):
        file.write_bytes(broken)
        refused(r"train-00001-of-00002.parquet' cannot be read: .*git lfs pull")
    pq.write_table(pa.table({"img": [b"1"], "label": [0]}), file)
    refused(r"has the columns img \(binary\), label \(int64\); expected image \{bytes, path\} and label")
    finished = in_process("train.py", f"data.root={root}", "device=cpu", f"output_root={tmp_path}")
    assert (finished.status, finished.stdout) == (2, "")
    assert finished.stderr.count("expected image {bytes, path} and label") == 1
    pq.write_table(table([b"1"], [0]).drop(["label"]), file)
    refused("expected image")
    for label in (-1, None):
        pq.write_table(table([b"1"], [label]), file)
        refused("rows of label -1, which is no class")
    pq.write_table(table([b"1"], [3], CLASSES), file)
    refused("names 3 classes, but its labels go up to 3")
    (root / "classes.txt").write_text("x\ny\nz\nw\n")
    file.write_bytes(whole)
    assert data.open_dataset("imagenet", root).train.class_names == ("x", "y", "z", "w")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused("pip install pyarrow")


def test_rows_without_names_are_packed_as_pictures(roots, tmp_path, capsys):
    _, root = roots
    for file in (root / "data").glob("*.parquet"):
        rows = pq.read_table(file)
        image = pa.array([{"bytes": row["bytes"], "path": None} for row in rows["image"].to_pylist()],
                         pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
        pq.write_table(rows.set_column(0, "image", image), file)
    shards = tmp_path / "shards"
    assert pack_dataset.main([str(root), str(shards), "--data", "imagenet"]) == 0
    packed, original = data.open_dataset("imagenet", shards), data.open_dataset("imagenet", root)
    assert [len(split) for split in packed] == [len(split) for split in original]
    for size in ("0", "-1", "nan"):
        with pytest.raises(SystemExit):
            pack_dataset.main([str(root), str(tmp_path / "none"), "--shard-size", size])
        assert "should be a number of MB above 0" in capsys.readouterr().err
