"""report.py over run folders of detectors and segmentors, each a few lines of what train.py writes."""

import csv
import json

import yaml
from programs import in_process


def write_run(folder, model, data, scores, seed=0, finished=True, **changed):
    folder.mkdir(parents=True)
    backbone = {"name": "rednet50", "pretrained": "/elsewhere.pt"} | model.pop("backbone", {})
    config = {"model": {**model, "backbone": backbone}, "data": {"name": data}, "train": {"epochs": 12}, "seed": seed}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | changed))
    lines = [dict.fromkeys(scores), scores] if finished else []
    lines = [{f"val_{name}": value for name, value in line.items()} | {"seconds": 1800.0} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        (folder / "summary.json").write_text("{}")


def report(folder):
    finished = in_process("scripts/report.py", str(folder), "--format", "csv")
    assert finished.status == 0, finished.stderr
    return list(csv.DictReader(finished.stdout.splitlines()))


def test_detectors_make_the_papers_table_3(tmp_path):
    parts = {"neck": "involution", "num_classes": 80}
    for seed, ap in enumerate((40.0, 41.0)):
        model = {"name": "faster_rcnn", "head": "convolution", "num_proposals": 1000, **parts}
        scores = {"ap": ap, "ap50": 61.0, "ap_large": None}
        write_run(tmp_path / f"faster{seed}", model, "coco", scores, seed)
    model = {"name": "faster_rcnn", "head": "convolution", "num_proposals": 1000, **parts}
    write_run(tmp_path / "wide", model | {"num_proposals": 500}, "coco", {"ap": 30.0}, finished=False)
    scores = {"ap": 39.0, "ap50": 60.0, "mask_ap": 35.0}
    write_run(tmp_path / "mask", {"name": "mask_rcnn", "head": "involution", **parts}, "coco", scores)
    write_run(tmp_path / "retina", {"name": "retinanet", **parts}, "coco", {"ap": 38.0}, optimizer={"lr": 0.01})
    two, mask, retina, wide = report(tmp_path)
    assert (two["model"], two["backbone"], two["neck"]) == ("faster_rcnn", "rednet50", "involution")
    assert (two["AP"], two["AP deviation"], two["AP50"], two["runs"]) == ("40.5", "0.7", "61.0", "2")
    assert (two["parameters (M)"], two["paper"], two["hours"]) == ("29.5", "40.2", "2.00")
    assert (wide["AP"], wide["runs"]) == ("", "0, 1 unfinished")
    assert "model.num_proposals=500" in wide["also"]
    assert (mask["mask AP"], mask["head"], mask["parameters (M)"], mask["paper"]) == (
        "35.0",
        "involution",
        "29.5",
        "39.6",
    )
    assert (retina["parameters (M)"], retina["paper"], retina["also"]) == ("26.2", "38.2", "optimizer.lr=0.01")
    assert not {"AP L", "mIoU", "plugin"} & set(two)  # nobody has any


def test_segmentors_have_miou_and_classifiers_a_table_of_their_own(tmp_path):
    model = {"name": "semantic_fpn", "neck": "involution", "num_classes": 19}
    write_run(tmp_path / "street", model, "cityscapes", {"miou": 78.0})
    write_run(tmp_path / "mine", model, "segmentation_folder", {"miou": 50.0})
    mine, street = report(tmp_path)
    assert (street["mIoU"], street["paper"], street["parameters (M)"]) == ("78.0", "79.2", "16.4")
    assert (mine["paper"], mine["also"]) == ("", "data.name=segmentation_folder")
    classifier = tmp_path / "classifier"
    classifier.mkdir()
    config = {"model": {"name": "rednet26", "num_classes": 10}, "data": {"val_size": 64}, "train": {}}
    (classifier / "config.yaml").write_text(yaml.safe_dump(config))
    refused = in_process("scripts/report.py", str(tmp_path))
    assert refused.status == 2
    assert "one by one" in refused.stderr
