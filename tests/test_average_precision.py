"""COCO's scores: those of pycocotools, whatever the ties, on any number of ranks."""

import contextlib
import dataclasses
import io
import json
import os
import socket

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from test_coco import write

from data.coco import bitmaps
from data.coco_file import COCO as COCO_LAYOUT
from data.coco_file import open_coco
from data.image_list import Names
from data.sampling import eval_batches
from involution.engine.distributed import World
from involution.engine.tasks.average_precision import (
    KINDS,
    MASK_NAMES,
    NAMES,
    Found,
    as_results,
    average_precision,
    score,
    write_results,
)  # fmt: skip
from involution.engine.tasks.detection import Detection


def perfect(images, index):
    """What a detector without fault says of an image: its objects, but no crowds."""
    mine = slice(int(images.first[index]), int(images.first[index + 1]))
    keep = ~images.crowd[mine]
    boxes = images.boxes[mine][keep]
    corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1).astype(np.float32)
    masks = [images.masks.raw(mine.start + int(k)) for k in np.flatnonzero(keep)]
    return Found(index, corners, np.ones(len(boxes), np.float32), images.labels[mine][keep], masks)


def mistaken(images, index):
    """Two shifted guesses for every object, one in ten of another class, with scores of one digit: many are equal."""
    random, true = np.random.default_rng(index), perfect(images, index)
    twice = np.repeat(np.arange(len(true.scores)), 2)
    shift = np.tile(random.normal(0, 0.1, (len(twice), 2)), 2) * np.tile(
        true.boxes[twice, 2:] - true.boxes[twice, :2], 2
    )
    size = images.sizes[index].tolist()
    pixels = bitmaps(true.masks, *size)
    rolled = [np.roll(pixels[k], random.normal(0, 4, 2).astype(int), (0, 1)) for k in twice]
    masks = [coco_mask.encode(np.asfortranarray(mask))["counts"] for mask in rolled]
    labels = np.where(random.random(len(twice)) < 0.1, 0, true.labels[twice])
    scores = random.random(len(twice)).round(1).astype(np.float32)
    return Found(index, (true.boxes[twice] + shift).astype(np.float32), scores, labels, masks)


@pytest.fixture(scope="module")
def val(photos):
    return open_coco(photos, COCO_LAYOUT).val


def test_the_truth_scores_a_hundred(val):
    """Complaint 9; COCO's 80 category ids have gaps."""
    assert val.crowd.any()
    scores = average_precision(val, [perfect(val, i) for i in range(len(val))], masks=True)
    assert [scores[name] for name in (*NAMES, *MASK_NAMES)] == [100.0] * 12
    found = {name: row["ap"] for name, row in scores["classes"].items() if row["ap"] is not None}
    assert set(found.values()) == {100.0}
    assert len(found) == len(np.unique(val.labels[~val.crowd]))


def test_scores_are_those_of_pycocotools_and_of_the_written_file(val, photos, tmp_path):
    found = [mistaken(val, i) for i in range(len(val))]
    ours = average_precision(val, found, masks=True)
    assert 10 < ours["mask_ap_small"] < ours["ap"] < 90
    write_results(tmp_path / "found.json", val, found)
    for kind, prefix in KINDS.items():
        rows = json.loads((tmp_path / "found.json").read_text())
        for row in rows if kind == "segm" else ():
            del row["bbox"]  # or pycocotools would take its area for the mask's
        with contextlib.redirect_stdout(io.StringIO()):
            api = COCO(str(photos / "annotations" / "instances_val2017.json"))
            theirs = COCOeval(api, api.loadRes(rows), kind)
            theirs.evaluate()
            theirs.accumulate()
            theirs.summarize()
        assert [ours[prefix + name] for name in NAMES] == pytest.approx(100 * theirs.stats[:6], abs=1e-10)
        person = theirs.eval["precision"][:, :, 0, 0, -1].mean()
        assert ours["classes"]["person"][f"{prefix}ap"] == pytest.approx(100 * person, abs=1e-10)


def test_pictures_that_could_not_be_read_and_classes_that_the_data_have_not_do_not_count(val):
    found = [perfect(val, i) for i in range(1, len(val))]  # data.on_error=skip met a bad file
    assert average_precision(val, found)["ap"] == 100
    beyond = found[0]._replace(labels=found[0].labels + len(val.class_names))  # model.num_classes may be more
    assert len(as_results(val, [beyond])) == 0


def test_an_object_without_a_mask_leaves_boxes_alone_to_be_scored(val, caplog):
    bare = Names.pack([b"", *(val.masks.raw(k) for k in range(1, len(val.masks)))])
    found = [perfect(val, i) for i in range(len(val))]
    scores = score(dataclasses.replace(val, masks=bare), found, World(0, 1, torch.device("cpu")))
    assert "1 objects of the data set have no masks" in caplog.text
    assert (scores["ap"], scores["mask_ap"]) == (100, None)
    assert set(Detection("mask_rcnn").names) <= scores.keys()


def test_nothing_found_and_nothing_to_find(val, tmp_path):
    nothing = [Found(i, np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int32)) for i in range(3)]
    assert as_results(val, nothing) == []
    assert average_precision(val.select([0, 1, 2]), nothing)["ap"] == 0
    pictures = open_coco(write(tmp_path)).val
    (empty,) = np.flatnonzero(np.bincount(pictures.owners, minlength=len(pictures)) == 0)
    assert average_precision(pictures.select([empty]), nothing[:1])["ap"] is None


def _rank(rank, size, batch, port, folder, answers):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=size)
    val = open_coco(folder, COCO_LAYOUT).val
    answers.put(_scored(val, rank, size, batch))
    dist.destroy_process_group()


def _scored(val, rank, size, batch):
    requests = eval_batches(len(val), batch, rank, size)
    mine = [int(i) for request in requests for i in request.indices[: request.valid]]
    world = World(rank, size, torch.device("cpu"))
    scores = score(val, [mistaken(val, i) for i in mine], world)
    assert scores.pop("scoring_seconds") > 0
    return scores


@pytest.mark.slow
def test_three_ranks_and_another_batch_size_give_the_same_bits(val, photos):
    """Complaint 5, detection; n too."""
    expected = _scored(val, 0, 1, 1)
    assert expected["n"] == 25
    assert _scored(val, 0, 1, 4) == expected
    context = mp.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, 3, 2, port, photos, answers)) for rank in range(3)]
    for process in ranks:
        process.start()
    given = [answers.get(timeout=300) for _ in ranks]
    for process in ranks:
        process.join()
    assert given == [expected] * 3
