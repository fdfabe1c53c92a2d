"""Detection trains, resumes, evaluates and predicts through the programs that classification has.

What users of code for dense prediction complain of, as requirements; the docstring of a test says which it proves.
 1  involutions in neck and head train at the full learning rate, with no step skipped: test_detectors_learn.py
 2  one command pretrains a RedNet-50 with the stem of detection: here
 3  our requirements are enough, on the newest torch: test_install.py
 4  any height and width: test_detectors, test_segmentors.py
 5  scores are the same bits on any number of ranks: test_average_precision, test_segmentation.py
 6  evaluation one image at a time; larger batches warn: test_detection_data.py
 7  degenerate boxes are dropped and counted: test_coco, test_detectors.py
 8  images without objects have a finite loss and gradients: test_detectors.py
 9  the truth scores 100; category ids are contiguous inside and mapped back: test_average_precision, test_coco.py
10  worker processes share arrays, not objects: test_coco.py
11  a hundred masks of a large image never lie in memory together: test_detection_data.py
12  one process that accumulates takes the steps of many ranks: here
13  a configuration states loss, RoIAlign and normaliser; the ResNet-50 row is a recipe: here
14  both encodings of Cityscapes' labels; a foreign value names its file: test_segmentation_data.py
15  UPerNet with one image a GPU is refused: test_segmentation.py
"""

import json
import sys

import numpy as np
import pytest
import torch
import yaml
from image_folders import write, write_squares
from PIL import Image
from programs import finish, in_process, kill, python, start, torchrun
from pycocotools.coco import COCO
from reliability import outcome, saved_step, wait_until
from test_config import config

from data.coco import bitmaps
from data.coco_file import COCO as COCO_LAYOUT
from data.coco_file import open_coco
from involution import create_model
from involution.engine.errors import UserError
from involution.engine.finetune import start_from
from involution.engine.tasks.detection import DetectionData
from involution.weights.run_file import read

# nine images in steps of 4: two steps of two micro-batches and a ragged one
TINY = [
    "recipe=demo_detection", "data=detection_folder", "device=cpu", "deterministic=true", "seed=1", "data.workers=1",
    "train.epochs=1", "train.global_batch_size=4", "train.batch_size=2", "train.evaluate_every_epochs=1",
    "train.log_every_steps=1", "train.checkpoint_every_steps=1", "model.min_size=64", "model.max_size=96",
    "optimizer=sgd", "optimizer.lr=1e-3", "schedule.warmup_epochs=0",
]  # fmt: skip
MASKS = ["model=mask_rcnn", "model.neck=involution", "model.head=involution", "model.num_proposals=16",
         "model.num_samples=8", "model.box_width=32", "augmentation.hflip=0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def words(folder, squares, *overrides):
    return [*TINY, f"data.root={squares}", f"output_root={folder}", "name=run", *overrides]


def last_line(run):
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def run(squares, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finished = python("train.py", *words(folder, squares, *MASKS))
    assert finished.status == 0, finished.stderr
    scores = [f"{mask}ap{part}" for mask in ("", "mask_") for part in ("", "50", "75", "_small", "_medium", "_large")]
    assert set(finished.result) == {"run_dir", "epochs", "steps", "best_ap", *(f"val_{name}" for name in scores)}
    return folder / "run"


@pytest.mark.slow
def test_a_run_records_its_task_and_a_killed_one_ends_bit_equal(run, squares, tmp_path):
    line = last_line(run)
    parts = ("objectness", "rpn_box_reg", "classifier", "box_reg", "mask")
    assert line["train_loss"] == pytest.approx(sum(line[f"train_loss_{part}"] for part in parts))
    assert line["val_ap_large"] is None  # there is nothing large to find
    assert b"detections" in b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    command = [sys.executable, "train.py", *words(tmp_path, squares, *MASKS)]
    process = start(command)
    wait_until(lambda: saved_step(tmp_path / "run") >= 1, process)
    kill(process)
    finished = finish(start(command))
    assert finished.status == 0, finished.stderr
    assert "going on from" in finished.stderr
    assert outcome(tmp_path / "run") == outcome(run)


@pytest.mark.slow
def test_files_are_as_the_benchmarks_server_takes_them_and_as_own_pictures_give(run, squares, tmp_path):
    recorded, results = last_line(run), tmp_path / "results.json"
    finished = in_process("eval.py", f"checkpoint={run}", f"predictions={results}", "device=cpu", "per_class=true")
    assert finished.status == 0, finished.stderr
    result = json.loads(finished.stdout.splitlines()[-1])
    assert result["n"] == 5
    assert result["seconds"] >= result["scoring_seconds"] > 0
    assert set(result["classes"]) == {"red", "blue"}
    scores = [name for name in result if "ap" in name and name != "mask_ap_large"]
    assert {name: result[name] for name in scores} == {name: recorded[f"val_{name}"] for name in scores}
    rows = json.loads(results.read_text())
    truth = COCO(str(squares / "annotations" / "instances_val.json"))
    assert len(truth.loadRes(rows).anns) == len(rows) > 0
    assert {row["category_id"] for row in rows} <= {3, 7}
    assert {tuple(row["segmentation"]["size"]) for row in rows} == {(48, 64), (64, 48)}
    sheet, table = tmp_path / "sheet.png", tmp_path / "found.json"
    finished = in_process(
        "eval.py", f"checkpoint={run}", f"images={squares}/val", f"contact_sheet={sheet}", f"output={table}",
        "min_score=0", "fold=false", "device=cpu",
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    said = json.loads(finished.stdout.splitlines()[-1])["predictions"]
    assert json.loads(table.read_text()) == said
    found = said[1]["objects"]
    same = [row for row in rows if row["image_id"] == 99]
    assert [thing["score"] for thing in found] == [round(row["score"], 6) for row in same]
    assert [thing["mask"] for thing in found] == [row["segmentation"] for row in same]
    assert np.asarray(Image.open(sheet)).shape[1] > 200


@pytest.mark.slow
def test_a_detector_of_other_classes_is_a_start(run):
    told = yaml.safe_load((run / "config.yaml").read_text())
    there, fresh = (read(run / "checkpoints" / "last.pt")["model"], create_model(**told["model"] | {"num_classes": 3}))
    start_from(fresh, told["model"], str(run), DetectionData(**told["data"]), ["red", "blue", "green"])
    own = fresh.state_dict()
    assert torch.equal(own["regions.box_head.fc6.weight"], there["regions.box_head.fc6.weight"])
    assert own["regions.box_predictor.cls_score.weight"].shape == (4, 32)
    assert own["regions.mask_predictor.mask_fcn_logits.bias"].shape == (4,)
    same = create_model(**told["model"])
    start_from(same, told["model"], str(run), DetectionData(**told["data"]), ["blue", "red"])  # in COCO's order of ids
    assert all(torch.equal(value, there[key]) for key, value in same.state_dict().items())


@pytest.mark.slow
def test_one_process_that_accumulates_and_two_ranks_take_the_same_steps_and_find_the_same(squares, tmp_path):
    """Complaint 12. RetinaNet draws no samples, so nothing but rounding may differ in training, and nothing at all in
    evaluation."""
    options = ["model=retinanet", "model.neck=involution"]
    alone = python("train.py", *words(tmp_path / "alone", squares, *options))
    assert alone.status == 0, alone.stderr
    both = torchrun(2, "train.py", *words(tmp_path / "both", squares, *options))
    assert both.status == 0, both.stderr
    one, two = (last_line(tmp_path / name / "run") for name in ("alone", "both"))
    assert one["step"] == two["step"] == 3
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-4)
    one, two = (
        {
            key: value
            for key, value in read(tmp_path / name / "run" / "checkpoints" / "last.pt")["model"].items()
            if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))  # of what rank 0 saw itself
        }
        for name in ("alone", "both")
    )
    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-4)
    evaluated = in_process("eval.py", f"checkpoint={tmp_path}/both/run", "device=cpu")
    assert json.loads(evaluated.stdout.splitlines()[-1])["ap"] == both.result["val_ap"]


def test_one_command_pretrains_the_backbone(tmp_path):
    """Complaint 2: a RedNet-50 with the 7 x 7 stem involution; every weight but the classifier's arrives."""
    finished = in_process(
        "train.py", "model.stem_kernel_size=7", "name=first", "data=folder", f"data.root={write(tmp_path / 'photos')}",
        f"output_root={tmp_path}", "device=cpu", "data.loader=torch", "data.workers=0", "data.train_size=32",
        "data.val_size=32", "train.max_steps=1", "train.global_batch_size=2", "train.batch_size=2",
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    trained = read(tmp_path / "first" / "checkpoints" / "last.pt")["model"]
    told = config("recipe=coco", "model.neck=involution", f"model.backbone.pretrained={tmp_path / 'first'}").model
    backbone = create_model(**told | {"num_classes": 2}).backbone.state_dict()
    assert trained["stem.conv2.kernel_generation.span.weight"].shape[0] == 7 * 7 * 2
    assert {key for key in trained if key not in backbone} == {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, trained[key]) for key, value in backbone.items())


def test_weights_with_another_stem_say_what_they_want(tmp_path):
    torch.save(create_model("rednet26", num_classes=2).state_dict(), tmp_path / "weights.pth")
    options = {"name": "rednet26", "pretrained": tmp_path / "weights.pth"}
    with pytest.raises(ValueError, match=r"these weights want \+model\.backbone\.stem_kernel_size=3$"):
        create_model("faster_rcnn", num_classes=2, backbone=options)
    create_model("faster_rcnn", num_classes=2, backbone=options | {"stem_kernel_size": 3})
    model = create_model("faster_rcnn", num_classes=2, backbone="rednet26")
    with pytest.raises(UserError, match="a classifier's weights; they go into the backbone"):
        start_from(model, {"name": "faster_rcnn"}, str(tmp_path / "weights.pth"), None, ["a", "b"])


def test_the_recipe_is_the_papers():
    """Complaint 13: what a run's config.yaml says of it, and the ResNet-50 row."""
    for options, lr, warmup, clip in (
        (["model=retinanet"], 0.01, 2000, None),
        (["model=retinanet", "model.neck=involution"], 0.01, 2000, 40),
        (["model=faster_rcnn"], 0.02, 500, None),
        (["model=faster_rcnn", "model.neck=involution"], 0.02, 2000, None),
        (["model=mask_rcnn", "model.neck=involution"], 0.02, 2000, None),
        (["model=faster_rcnn", "model.neck=involution", "model.head=involution"], 0.02, 2000, 5),
        (["model=mask_rcnn", "model.neck=involution", "model.head=involution"], 0.02, 2000, 5),
    ):
        found = config("recipe=coco", *options)
        assert (found.optimizer["lr"], found.schedule["warmup_steps"], found.train.clip_grad_norm) == (lr, warmup, clip)
        assert (found.train.epochs, found.train.global_batch_size, found.train.batch_size) == (12, 16, 2)
        assert (found.schedule["milestones"], found.schedule["gamma"]) == ([8, 11], 0.1)
        assert (found.optimizer["momentum"], found.optimizer["weight_decay"]) == (0.9, 1e-4)
        assert (found.model["min_size"], found.model["max_size"]) == (800, 1333)
        assert found.model.get("num_samples", 512) == 512
        said = {key: found.model[key] for key in ("box_loss_beta", "roi_aligned", "roi_samples") if key in found.model}
        if found.model["name"] == "retinanet":
            assert said | {"normalizer": found.model["normalizer"]} == {"box_loss_beta": 0, "normalizer": "batch"}
        else:
            assert said == {"box_loss_beta": 0, "roi_aligned": True, "roi_samples": 0}
    baseline = config("recipe=coco_baseline")
    assert baseline.model["backbone"]["name"] == "resnet50"
    assert baseline.train.clip_grad_norm is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=faster_rcnn", "data=imagenet"], "model=faster_rcnn does not go with data=imagenet"),
        (["model=rednet26", "data=coco"], "model=rednet26 does not go with data=coco"),
        (["model=faster_rcnn", "data=coco"], "coco or demo_detection for detection"),
        (["recipe=coco", "data.loader=dali"], "use data.loader=torch"),
        (["recipe=coco", "data.root=/nowhere"], "'/nowhere' does not exist"),
        (["recipe=coco", "train.freeze=1"], "model.backbone.freeze"),
        (["recipe=coco", "train.label_smoothing=0.1"], "set it to 0"),
        (["recipe=coco", "model=mask_rcnn", "data=detection_folder", "data.root=NO_MASKS"], "use model=faster_rcnn"),
    ],
)
def test_wrong_input_ends_with_one_message_and_status_2(tmp_path, arguments, message):
    if "data.root=NO_MASKS" in arguments:
        root = write_squares(tmp_path / "bare")
        for path in (root / "annotations").iterdir():
            content = json.loads(path.read_text())
            for row in content["annotations"]:
                del row["segmentation"]
            path.write_text(json.dumps(content))
        arguments = [*arguments[:-1], f"data.root={root}"]
    finished = in_process("train.py", f"output_root={tmp_path / 'runs'}", "device=cpu", *arguments)
    assert finished.status == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_another_number_of_classes_is_refused(run, photos):
    finished = in_process("eval.py", f"checkpoint={run}", "data=coco", f"data.root={photos}", "device=cpu")
    assert finished.status == 2, finished.stderr
    assert "the data set's classes (person, bicycle, car, ...) are not those that the checkpoint" in finished.stderr
    assert len(open_coco(photos, COCO_LAYOUT).val.class_names) == 80
    assert bitmaps([], 4, 4).shape == (0, 4, 4)
