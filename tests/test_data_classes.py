"""Which classes, which names, which files: val may lack classes, names may be odd, pipes are refused."""

import csv
import json
import os
import re
import threading
from pathlib import Path

import pytest
import torch
from image_folders import encoded, write
from programs import in_process, python

import data
from data.image_list import ImageList, Names
from involution import create_model, load
from involution.export import save_safetensors
from scripts import pack_dataset

ODD = ("a\nb", "a\rb", "a\u2028b", "é", "z\x85", os.fsdecode(b"\xff"))


def classes_of(images: ImageList) -> list[str]:
    return [images.class_names[target] for target in images.targets]


def test_val_may_lack_classes_and_keeps_the_numbers_of_train(tmp_path, caplog):
    root = write(tmp_path)
    for path in (root / "val" / "a").iterdir():
        path.unlink()
    for there in ("an empty folder", "no folder"):
        splits = data.open_dataset("folder", root)
        assert classes_of(splits.val) == ["b"] * 3 + ["c"] * 3
        assert splits.val.targets.tolist() == [1, 1, 1, 2, 2, 2]
        assert splits.val.class_names == splits.train.class_names
        assert "val has no images of 1 of the 3 classes: a" in caplog.text
        caplog.clear()
        if there == "an empty folder":
            (root / "val" / "a").rmdir()


def test_shards_without_names_may_lack_the_last_class(tmp_path):
    root = write(tmp_path / "folder")
    for path in (root / "val" / "c").iterdir():
        path.unlink()
    assert pack_dataset.main([str(root), str(tmp_path / "shards")]) == 0
    (tmp_path / "shards" / "classes.txt").unlink()
    splits = data.open_dataset("folder", tmp_path / "shards")
    assert splits.val.class_names == ("0", "1", "2")
    assert sorted(splits.val.targets) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["direct", "linked"])
def test_a_pipe_among_the_images_is_refused_and_not_waited_for(tmp_path, kind):
    root = write(tmp_path)
    pipe = root / "train" / "b" / "pipe.jpg"
    os.mkfifo(pipe if kind == "direct" else tmp_path / "elsewhere")
    if kind == "linked":
        pipe.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"pipe\.jpg' cannot be read as an image: it is a pipe"):
        data.open_dataset("folder", root)
    names = Names.pack([b"pipe.jpg"])
    names.prefix = f"{pipe.parent}/"
    later = ImageList(names, torch.zeros(1, dtype=torch.int32).numpy(), ("b",))
    found: list[BaseException] = []

    def read() -> None:
        try:
            later.read(0)
        except data.BadImageError as error:
            found.append(error)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    reader.join(20)
    assert found, "it waits for somebody to write"
    assert "it is a pipe" in str(found[0])
    finished = in_process("eval.py", "checkpoint=gone.pt", f"images={pipe}", "device=cpu")
    assert finished.status == 2
    assert "is a pipe or a device" in finished.stderr


def odd_folder(root: Path, classes: tuple[str, ...] = ODD) -> Path:
    return write(root, classes, each=1)


def test_odd_class_names_are_packed_or_refused_and_never_shifted(tmp_path, capsys):
    kept = ODD[2:]
    root = odd_folder(tmp_path / "folder", kept)
    assert pack_dataset.main([str(root), str(tmp_path / "shards")]) == 0
    folders, shards = (data.open_dataset("folder", place) for place in (root, tmp_path / "shards"))
    assert shards.train.class_names == folders.train.class_names
    assert set(kept) == set(shards.train.class_names)
    for one, other in zip(folders, shards, strict=True):
        expected = {one.read(i): one.class_names[one.targets[i]] for i in range(len(one))}
        assert {other.read(i): other.class_names[other.targets[i]] for i in range(len(other))} == expected
    for name in ("a\nb", "a\r"):
        assert pack_dataset.main([str(odd_folder(tmp_path / repr(name), (name, "b"))), str(tmp_path / "none")]) == 2
        assert f"the name of class {name!r} has a line end" in capsys.readouterr().err


def test_odd_names_in_predictions_reports_and_safetensors(tmp_path):
    root = odd_folder(tmp_path / "folder")
    (root / "val" / ODD[0] / os.fsdecode(b"\xfe\n.jpg")).write_bytes(encoded(7))
    names = data.open_dataset("folder", root).train.class_names
    model = create_model("resnet26", num_classes=len(ODD))
    preparation = {"val_size": 32, "val_resize": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    save_safetensors(model, tmp_path / "saved", names, preparation=preparation)
    assert load(tmp_path / "saved" / "model.safetensors").class_names == names
    card = (tmp_path / "saved" / "README.md").read_bytes().decode()
    listed = re.findall(r"^\d+\. (.*)$", card, re.MULTILINE)
    assert len(listed) == len(names)
    assert listed[names.index("a\nb")] == "a\\nb"

    told = [f"checkpoint={tmp_path}/saved/model.safetensors", "device=cpu", "batch_size=2"]
    table = tmp_path / "a.csv"
    words = ["data=folder", f"data.root={root}", "data.loader=torch", "data.workers=0", f"predictions={table}"]
    finished = in_process("eval.py", *told, *words)
    assert finished.status == 0, finished.stderr
    with open(table, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ODD) + 1
    assert {"val/a\nb/0.jpg", "val/a\u2028b/0.jpg", "val/a\nb/\\udcfe\n.jpg"} <= {row["path"] for row in rows}
    assert {row["target"] for row in rows} >= {"a\nb", "a\rb", "a\u2028b", "\\udcff"}
    compared = in_process("scripts/report.py", "--compare", str(table), str(table))
    assert compared.status == 0, compared.stderr

    finished = python("eval.py", *told, f"images={root}/val", f"output={tmp_path}/p.csv", PYTHONIOENCODING="utf-8")
    assert finished.status == 0, finished.stderr
    assert len(json.loads(finished.stdout.splitlines()[-1])["predictions"]) == len(ODD) + 1
    assert len((tmp_path / "p.csv").read_text(encoding="utf-8")) > 100
