"""Detection's batches and what is made of detections: flips, ranks, bad files, losses, masks, drawings."""

import json
import os
from itertools import chain

import numpy as np
import pytest
import torch
from image_folders import write_squares
from PIL import Image
from pycocotools import mask as coco_mask
from torch.utils._python_dispatch import TorchDispatchMode

from data.coco_file import open_coco
from data.detection import DetectionBatch, DetectionPictures, eval_loader, train_loader
from data.sampling import MicroBatch
from involution.engine.distributed import World
from involution.engine.tasks import detection as setup
from involution.engine.tasks.average_precision import Found, as_found
from involution.engine.tasks.detected_pictures import draw_objects
from involution.engine.tasks.detection import Detection, DetectionData


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
    Image.new("RGB", (48, 64)).save(tmp_path / "val" / "0.png")  # a file that could be read the next time
    (batch,) = loader
    assert (batch.valid, len(loader.skipped)) == (2, 1)
    (tmp_path / "val" / "0.png").unlink()
    os.mkfifo(tmp_path / "val" / "0.png")  # nobody writes to it
    loader = eval_loader(val.select([1, 2]), batch_size=2, workers=0, on_error="skip")
    (batch,) = loader
    assert (batch.valid, len(batch.images), len(loader.skipped)) == (0, 1, 2)  # what runs without counting


def test_evaluation_in_batches_warns(squares, caplog):
    """Complaint 6: one image at a time unless someone asks."""
    data = DetectionData("detection_folder", str(squares), "torch", 0, "stop")
    val, world = open_coco(squares).val, World(0, 1, torch.device("cpu"))
    setup.eval_loader(val, data, 1, world)
    assert "padded" not in caplog.text
    setup.eval_loader(val, data, 2, world)
    assert "images are padded to the largest of their batch" in caplog.text


def test_the_loss_of_a_batch_is_its_mean_times_the_images_that_count():
    losses = dict.fromkeys(("loss_classifier", "loss_box_reg"), torch.tensor(3.0))
    image, task = torch.zeros(3, 8, 8, dtype=torch.uint8), Detection("retinanet")
    for count, valid in ((2, 2), (1, 0)):
        parts = [torch.zeros(0, 4)] * count, [torch.zeros(0, dtype=torch.int64)] * count, [[]] * count
        batch = DetectionBatch([image] * count, *parts, list(range(count)), valid, [])
        assert task.loss(lambda images, targets: losses, batch) == dict.fromkeys(losses, 3.0 * valid)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that an operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.numel() * result.element_size())
        return result


def test_a_hundred_masks_of_a_large_picture_become_run_lengths_one_by_one():
    """Complaint 11: at once they would be 1.2 GB of booleans, and 4.8 GB of the floats before them."""
    boxes = torch.tensor([[10.0, 20, 50, 100], [3000, 1000, 3999.5, 2999]]).repeat(50, 1)
    result = {
        "boxes": boxes, "scores": torch.ones(100), "labels": torch.zeros(100, dtype=torch.int64),
        "masks": torch.ones(100, 28, 28),
    }  # fmt: skip
    with Largest() as largest:
        found = as_found(0, result, (3000, 4000))
    assert 3000 * 4000 <= largest.bytes <= 2 * 3000 * 4000
    assert sum(map(len, found.masks)) < 200_000  # of run lengths
    areas = coco_mask.area([{"size": [3000, 4000], "counts": mask} for mask in found.masks])
    assert areas == pytest.approx([40 * 80, 999.5 * 1999] * 50, rel=0.01)


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
