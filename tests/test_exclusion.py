"""Exclusion lists as people write them, entries that are no image, and scans where nothing can be written."""

import os
from pathlib import Path

import pytest
from image_folders import encoded, write

import data
from data.datasets import EXCLUDED
from scripts import check_dataset, pack_dataset


def left_out(root: Path, exclude: Path | None = None) -> set[str]:
    kept = {path for images in data.open_dataset("folder", root, exclude) for path in images.paths}
    return {os.path.relpath(path, root) for path in map(str, root.rglob("*.jpg")) if path not in kept}


@pytest.mark.parametrize(
    "line",
    [
        b"train/a/0.jpg",
        b"train/a/0.jpg\tbroken data stream",
        b"./train/a/0.jpg",
        b"{root}/train/a/0.jpg\tseen on Monday",
        b"{link}/train//a/./0.jpg",
        b"train/a/0.jpg # seen on Monday",
        b"train/a/0.jpg# seen on Monday",
        b"  train/a/0.jpg\t# seen on Monday  ",
        b"train/a/0.jpg\r",
        b"\xef\xbb\xbftrain/a/0.jpg",
        b'"train/a/0.jpg"',
        b"train\\a\\0.jpg",
        "train/a/0.jpg\r\nval/b/1.jpg\r\n".encode("utf-16"),
    ],
)
def test_every_spelling_counts(line, tmp_path, caplog):
    root = write(tmp_path / "images")
    (tmp_path / "link").symlink_to(root)
    line = line.replace(b"{root}", bytes(root)).replace(b"{link}", bytes(root.resolve()))
    (root / EXCLUDED).write_bytes(b"# a comment\n\n" + line + b"\n" if line[:1] not in b"\xef\xff" else line)
    assert "train/a/0.jpg" in left_out(root)
    assert len(left_out(root)) == 1 + line.startswith(b"\xff")
    assert "no image of the data set" not in caplog.text


def test_names_with_tabs_hashes_and_backslashes_survive_a_scan(tmp_path, caplog):
    root = write(tmp_path)
    odd = [
        "a\tb.jpg",
        "a #1.jpg",
        "#2.jpg",
        "a\\nb.jpg",
        "a\nb.jpg",
        " blank.jpg",
        "a\u2028b.jpg",
        os.fsdecode(b"\xff.jpg"),
    ]
    for name in odd:
        (root / "train" / "a" / name).write_bytes(b"no image")
    assert check_dataset.main([str(root), "--workers", "1"]) == 1
    assert left_out(root) == {f"train/a/{name}" for name in odd}
    assert "no image of the data set" not in caplog.text


def test_an_entry_that_is_no_image_is_reported(tmp_path, caplog):
    root = write(tmp_path / "images")
    (tmp_path / "list.txt").write_text("a/0.jpg\ntrain/b/1.jpg\nval/a/9.jpg\tgone\n")
    assert left_out(root, tmp_path / "list.txt") == {"train/b/1.jpg"}
    assert f"2 of 3 entries of the exclusion list {tmp_path}/list.txt are no image of the data set" in caplog.text
    assert "'a/0.jpg', 'val/a/9.jpg\\tgone'" in caplog.text


def test_a_scan_that_cannot_write_says_what_it_found(tmp_path, capsys):
    root = write(tmp_path)
    (root / "val" / "a" / "0.jpg").write_bytes(encoded(side=64)[:300])
    (root / EXCLUDED).mkdir()  # as if it were a read-only folder, for root too
    assert check_dataset.main([str(root), "--workers", "1"]) == 2
    told = capsys.readouterr()
    assert f"{root}/val/a/0.jpg: Truncated File Read" in told.out
    assert "1 of 18 images cannot be read" in told.out
    assert "--output FILE" in told.err
    assert check_dataset.main([str(root), "--workers", "1", "--output", str(tmp_path / "list.txt")]) == 1
    assert left_out(root, tmp_path / "list.txt") == {"val/a/0.jpg"}


def test_images_in_shards_are_excluded_too(tmp_path):
    root = write(tmp_path / "folder")
    (root / "train" / "a" / "0.jpg").write_bytes(b"no image")
    assert pack_dataset.main([str(root), str(tmp_path / "shards")]) == 0
    assert check_dataset.main([str(tmp_path / "shards"), "--workers", "1"]) == 1
    splits = data.open_dataset("folder", tmp_path / "shards")
    assert (len(splits.train), len(splits.val)) == (8, 9)
