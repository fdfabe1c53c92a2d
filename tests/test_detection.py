"""Detection trains, resumes, evaluates and predicts through the programs that classification has."""

import json
import sys
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image
from programs import finish, in_process, python, start, torchrun
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from reliability import kill, outcome, saved_step, wait_until
from test_config import config

from data.coco import bitmaps
from data.coco_file import COCO as COCO_LAYOUT
from data.coco_file import open_coco
from data.detection import DetectionBatch, DetectionPictures, eval_loader, train_loader
from data.sampling import MicroBatch
from involution.engine.tasks.average_precision import Found, as_found
from involution.engine.tasks.detected_pictures import draw_objects
from involution.engine.tasks.detection import Detection
from involution.weights.run_file import read


def write_squares(root, counts=(("train", 9), ("val", 5))):
    """Pictures with a red and a blue square on noise, wide and tall ones, in COCO's format with ids of their own."""
    random = np.random.default_rng(0)
    for split, count in counts:
        (root / split).mkdir(parents=True)
        images, objects = [], []
        for i in range(count):
            height, width = (48, 64) if i % 3 else (64, 48)
            picture = random.integers(0, 90, (height, width, 3))
            images.append({"id": 100 - i, "file_name": f"{i}.png", "height": height, "width": width})
            for channel, category in ((0, 7), (2, 3)):
                x, y = 4 + 20 * (channel // 2), int(random.integers(4, 20))
                picture[y : y + 16, x : x + 16, channel] = 250
                corners = [x, y, x + 16, y, x + 16, y + 16, x, y + 16]
                objects.append({
                    "id": len(objects), "image_id": 100 - i, "category_id": category, "bbox": [x, y, 16, 16],
                    "area": 256, "iscrowd": 0, "segmentation": [corners],
                })  # fmt: skip
            Image.fromarray(picture.astype(np.uint8)).save(root / split / f"{i}.png")
        categories = [{"id": 7, "name": "red"}, {"id": 3, "name": "blue"}]
        content = {"images": images, "annotations": objects, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("squares"))


def test_flips_are_functions_of_seed_epoch_and_sample(squares):
    train = open_coco(squares).train
    pictures = DetectionPictures(train, seed=1, flip=0.5, masks=True)
    everything = MicroBatch(3, np.arange(len(train)), len(train))
    together = pictures[everything]
    mirrored = 0
    for index in range(len(train)):
        alone = pictures[MicroBatch(3, np.array([index]), 1)]
        assert torch.equal(alone.images[0], together.images[index])
        plain = DetectionPictures(train, masks=True)[MicroBatch(3, np.array([index]), 1)]
        flipped = not torch.equal(plain.images[0], alone.images[0])
        mirrored += flipped
        plain_masks, masks = (batch.targets(masks=True)[0]["masks"] for batch in (plain, alone))
        assert torch.equal(masks, plain_masks.flip(2) if flipped else plain_masks)
        for box, mask in zip(alone.boxes[0], masks):  # the box follows its mask, and both the pixels
            y, x = mask.nonzero().T
            assert box.tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert (alone.images[0].amax(0)[masks.amax(0) > 0] == 250).all()
    assert 0 < mirrored < len(train)


def test_every_rank_takes_its_part_of_the_same_steps(squares):
    train = open_coco(squares).train
    steps = {}
    for ranks, size in ((1, 4), (1, 2), (2, 2), (2, 1)):
        loaders = [
            train_loader(train, batch_size=size, global_batch_size=4, seed=0, rank=rank, world_size=ranks, workers=0)
            for rank in range(ranks)
        ]
        seen = []
        for step in range(6):  # two epochs of nine images
            count = loaders[0].micro_batches(step)
            batches = [next(loader) for loader in loaders for _ in range(count)]
            seen.append(sorted(i for batch in batches for i in batch.indices[: batch.valid]))
        steps[ranks, size] = seen
        for epoch in (seen[:3], seen[3:]):
            assert sorted(chain.from_iterable(epoch)) == list(range(9))
    assert len({json.dumps(seen) for seen in steps.values()}) == 1


def test_files_that_cannot_be_read_are_named_or_left_out(squares, tmp_path):
    val = open_coco(write_squares(tmp_path, (("train", 3), ("val", 3)))).val
    Image.new("RGB", (64, 64)).save(tmp_path / "val" / "1.png")  # of another size than its annotation says
    (tmp_path / "val" / "0.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"0\.png.*cannot identify|1\.png.*64 x 64 pixels, in the annotations 64 x 48"):
        list(eval_loader(val, workers=0))
    loader = eval_loader(val, batch_size=3, workers=0, on_error="skip")
    (batch,) = loader
    assert (batch.valid, len(batch.images), len(loader.skipped)) == (1, 1, 2)
    loader = eval_loader(val.select([1, 2]), batch_size=2, workers=0, on_error="skip")
    (batch,) = loader
    assert (batch.valid, len(batch.images), len(loader.skipped)) == (0, 1, 2)  # what runs without counting


def test_the_loss_of_a_batch_is_its_mean_times_the_images_that_count():
    losses = dict.fromkeys(("loss_classifier", "loss_box_reg"), torch.tensor(3.0))
    image, task = torch.zeros(3, 8, 8, dtype=torch.uint8), Detection("retinanet")
    for count, valid in ((2, 2), (1, 0)):
        parts = [torch.zeros(0, 4)] * count, [torch.zeros(0, dtype=torch.int64)] * count, [[]] * count
        batch = DetectionBatch([image] * count, *parts, list(range(count)), valid, [])
        assert task.loss(lambda images, targets: losses, batch) == dict.fromkeys(losses, 3.0 * valid)


def test_masks_of_a_large_picture_become_run_lengths():
    boxes = torch.tensor([[10.0, 20, 50, 100], [3000, 1000, 3999.5, 2999]])
    result = {
        "boxes": boxes, "scores": torch.ones(2), "labels": torch.zeros(2, dtype=torch.int64),
        "masks": torch.ones(2, 28, 28),
    }  # fmt: skip
    found = as_found(0, result, (3000, 4000))
    areas = coco_mask.area([{"size": [3000, 4000], "counts": mask} for mask in found.masks])
    assert areas == pytest.approx([40 * 80, 999.5 * 1999], rel=0.01)


def test_drawing_shows_boxes_masks_and_names():
    picture = torch.full((3, 600, 800), 128, dtype=torch.uint8)
    pixels = np.zeros((600, 800), np.uint8, order="F")
    pixels[150:350, 250:550] = 1
    boxes, one = np.array([[200.0, 100, 600, 400]], np.float32), np.ones(1, np.float32)
    found = Found(0, boxes, one, np.array([1], np.int32), [coco_mask.encode(pixels)["counts"]])
    shown = draw_objects(picture, found, ["red", "blue"])
    assert shown.shape == (3, 360, 480)
    changed = (shown != 128).any(0)
    assert changed[150, 240]  # inside the mask
    assert changed[150, 120]  # on the box
    assert not changed[150, 135]  # inside the box alone
    assert not changed[300:, :].any()
    assert (draw_objects(picture, found._replace(masks=None), ["red", "blue"]) != 128).any()
    assert (draw_objects(picture, Found(0, boxes[:0], one[:0], np.zeros(0, np.int32)), []) == 128).all()


TINY = [
    "recipe=demo_detection", "data=detection_folder", "device=cpu", "deterministic=true", "seed=1", "data.workers=1",
    "train.epochs=2", "train.global_batch_size=4", "train.batch_size=2", "train.evaluate_every_epochs=2",
    "train.log_every_steps=1", "train.checkpoint_every_steps=1", "model.min_size=96", "model.max_size=128",
]  # fmt: skip
MASKS = ["model=mask_rcnn", "model.neck=involution", "model.head=involution", "model.num_proposals=24",
         "model.num_samples=16", "augmentation.hflip=0.5"]  # fmt: skip


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
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, process)
    kill(process)
    finished = finish(start(command))
    assert finished.status == 0, finished.stderr
    assert "going on from" in finished.stderr
    assert outcome(tmp_path / "run") == outcome(run)


@pytest.mark.slow
def test_ranks_agree_on_the_score_and_files_are_as_the_benchmarks_server_takes_them(run, squares, tmp_path):
    recorded, results = last_line(run), tmp_path / "results.json"
    finished = torchrun(2, "eval.py", f"checkpoint={run}", f"predictions={results}", "device=cpu", "per_class=true")
    assert finished.status == 0, finished.stderr
    result = finished.result
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
        "min_score=0", "device=cpu",
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
def test_one_process_that_accumulates_and_two_ranks_take_the_same_steps(squares, tmp_path):
    """RetinaNet draws no samples, so nothing but rounding may differ."""
    options = ["model=retinanet", "model.neck=involution", "train.epochs=1", "train.evaluate_every_epochs=1"]
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


def test_the_recipe_is_the_papers():
    for options, lr, warmup, clip in (
        (["model=retinanet"], 0.01, 2000, 40),
        (["model=faster_rcnn"], 0.02, 500, None),
        (["model=faster_rcnn", "model.neck=involution"], 0.02, 2000, 40),
        (["model=mask_rcnn", "model.neck=involution", "model.head=involution"], 0.02, 2000, 5),
    ):
        found = config("recipe=coco", *options)
        assert (found.optimizer["lr"], found.schedule["warmup_steps"], found.train.clip_grad_norm) == (lr, warmup, clip)
        assert (found.train.epochs, found.train.global_batch_size, found.train.batch_size) == (12, 16, 2)
        assert (found.schedule["milestones"], found.schedule["gamma"]) == ([8, 11], 0.1)
        assert (found.optimizer["momentum"], found.optimizer["weight_decay"]) == (0.9, 1e-4)
        assert (found.model["min_size"], found.model["max_size"]) == (800, 1333)
        assert found.model.get("num_samples", 512) == 512
    baseline = config("recipe=coco_baseline")
    assert baseline.model["backbone"]["name"] == "resnet50"
    assert baseline.train.clip_grad_norm is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=faster_rcnn", "data=imagenet"], "model=faster_rcnn cannot be trained on data=imagenet"),
        (["model=rednet26", "data=coco"], "model=rednet26 cannot be trained on data=coco"),
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
    assert "classes" in finished.stderr
    assert len(open_coco(photos, COCO_LAYOUT).val.class_names) == 80
    assert bitmaps([], 4, 4).shape == (0, 4, 4)
