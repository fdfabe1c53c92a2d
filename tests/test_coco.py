"""COCO's files as flat arrays, what is wrong with them, the order of batches, and the demo scenes."""

import copy
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data.coco import bitmaps
from data.coco_file import COCO as COCO_LAYOUT
from data.coco_file import FOLDER, open_coco
from data.demo_detection import COUNTS, demo_detection_root
from data.orders import by_orientation
from data.sampling import permutation

SQUARE = [[2, 2, 12, 2, 12, 12, 2, 12]]
IMAGES = [
    {"id": 7, "file_name": "b.png", "height": 40, "width": 60},
    {"id": 3, "file_name": "a.png", "height": 60, "width": 40},
    {"id": 9, "file_name": "small.png", "height": 20, "width": 60},
    {"id": 11, "file_name": "empty.png", "height": 40, "width": 60},
]
CATEGORIES = [{"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}]


def an_object(**values):
    fixed = {"id": 5, "image_id": 7, "category_id": 90, "bbox": [2, 2, 10, 10], "area": 100, "iscrowd": 0}
    return fixed | {"segmentation": SQUARE} | values


OBJECTS = [
    an_object(),
    an_object(id=6, image_id=3, category_id=1, bbox=[-2.5, 50, 20, 12]),  # sticks out a little
    an_object(id=7, bbox=[5, 5, 0.4, 9]),  # degenerate
    an_object(id=8, iscrowd=1, segmentation={"size": [40, 60], "counts": [0, 2400]}),
    an_object(id=9, image_id=9),  # of an image under 32 pixels
]


def write(root, changes=None, folder="{split}", file="annotations/instances_{split}.json"):
    """A folder in COCO's format; `changes` {split: {key: value}} replace parts of a file."""
    for split in ("train", "val"):
        content = {"images": IMAGES, "annotations": OBJECTS, "categories": CATEGORIES}
        content = copy.deepcopy(content) | (changes or {}).get(split, {})
        path = root / file.format(split=split)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
        (root / folder.format(split=split)).mkdir(parents=True, exist_ok=True)
        for image in IMAGES:
            size = (image["width"], image["height"])
            Image.new("RGB", size).save(root / folder.format(split=split) / image["file_name"])
    return root


def test_objects_without_an_area_have_that_of_their_boxes(tmp_path):
    (folder, file), *_ = FOLDER
    root = write(tmp_path, folder=folder, file=file)
    (path,) = [path for path in root.rglob("*.json") if "val" in path.name]
    content = json.loads(path.read_text())
    for row in content["annotations"]:
        row["area"] = None
    path.write_text(json.dumps(content))
    val = open_coco(root).val
    assert val.areas.tolist() == (val.boxes[:, 2] * val.boxes[:, 3]).tolist()


@pytest.mark.parametrize(("folder", "file"), FOLDER)
def test_what_there_is_to_learn_from(tmp_path, folder, file):
    """Complaints 7 and 9: what is left out, and category ids that are contiguous inside."""
    train, val = open_coco(write(tmp_path, folder=folder, file=file))
    assert val.ids.tolist() == [3, 7, 9, 11]  # evaluated: all of them
    assert train.ids.tolist() == [3, 7]  # neither the small image nor the empty one
    assert train.class_names == ("person", "toothbrush")
    assert train.category_ids.tolist() == [1, 90]
    tall, wide = train.objects(0), train.objects(1)
    assert tall.boxes.tolist() == [[0, 50, 17.5, 60]]
    assert (tall.labels.tolist(), wide.labels.tolist()) == ([0], [1])
    assert wide.boxes.tolist() == [[2, 2, 12, 12]]  # neither the degenerate box nor the crowd
    square = bitmaps(wide.masks, 40, 60)
    assert square.sum() == square[0, 2:12, 2:12].sum() == 100
    assert val.degenerate().sum() == 1
    assert val.objects(3).boxes.shape == (0, 4)
    assert bitmaps(val.objects(3).masks, 40, 60).shape == (0, 40, 60)


def test_boxes_areas_and_masks_equal_pycocotools(photos):
    val = open_coco(photos, COCO_LAYOUT).val
    api = COCO(str(photos / "annotations" / "instances_val2017.json"))
    assert val.ids.tolist() == sorted(api.imgs)
    assert (len(val), len(val.labels), int(val.crowd.sum()), len(val.class_names)) == (25, 213, 2, 80)
    for index in range(len(val)):
        rows = api.imgToAnns[int(val.ids[index])]
        mine = range(int(val.first[index]), int(val.first[index + 1]))
        assert val.boxes[mine].tolist() == [row["bbox"] for row in rows]
        assert val.areas[mine].tolist() == [row["area"] for row in rows]
        assert val.category_ids[val.labels[mine]].tolist() == [row["category_id"] for row in rows]
        masks = bitmaps([val.masks.raw(k) for k in mine], *val.sizes[index])
        for mask, row in zip(masks, rows, strict=True):
            assert np.array_equal(mask, api.annToMask(row))


def test_workers_get_arrays_and_no_objects(photos):
    """Complaint 10: what a forked worker looks at must hold no Python object for every image or object: counting
    references to them would copy their pages into each worker."""
    train = open_coco(photos, COCO_LAYOUT).train
    many = train.select(np.arange(len(train)))
    assert many.fingerprint["sha256"] == train.fingerprint["sha256"]
    buffers = []
    skeleton = pickle.dumps(many, protocol=5, buffer_callback=buffers.append)
    assert len(skeleton) < 4000  # the same for 118 000 images: the classes' names and headers of arrays
    assert train.select([3]).objects(0).masks == train.objects(3).masks


WRONG = {
    "object of an image that is not listed": (
        {"annotations": [an_object(image_id=8), an_object(id=6, image_id=8)]},
        "2 times, first object 5 is in image 8, which is not listed",
    ),
    "image without a file": (
        {"images": [*IMAGES, {"id": 12, "file_name": "gone.png", "height": 40, "width": 60}]},
        r"1 of 5 images .* are not in .*, first gone.png",
    ),
    "categories that differ": (
        {"categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "person"}]},
        r"differ in 1 ids \(id: train \| val\): 90: toothbrush \| brush; make them equal",
    ),
    "corners for width and height": (
        {"annotations": [an_object(bbox=[40, 5, 50, 20])]},
        r"object 5 in image 7 has the bbox \[40.0, 5.0, 50.0, 20.0\], mostly outside the image of 60 x 40 pixels",
    ),
    "run lengths of another size": (
        {"annotations": [an_object(segmentation={"size": [60, 40], "counts": [0, 2400]})]},
        r"object 5 in image 7: its mask is of \[60, 40\] pixels, its image of \[40, 60\]",
    ),
    "run lengths that do not cover the image": (
        {"annotations": [an_object(segmentation={"size": [40, 60], "counts": [0, 100]})]},
        "its mask counts 100 pixels, its image has 2400",
    ),
    "category that is not listed": ({"annotations": [an_object(category_id=2)]}, "has category 2, which is not listed"),
    "three numbers": ({"annotations": [an_object(bbox=[1, 2, 3])]}, r"has the bbox \[1, 2, 3\], not four numbers"),
    "not a number": ({"annotations": [an_object(bbox=[1, 2, float("nan"), 3])]}, "not x, y, width >= 0, height >= 0"),
    "an id twice": ({"images": [IMAGES[0], IMAGES[0]]}, "lists an image id twice"),
    "a category twice": ({"categories": [*CATEGORIES, CATEGORIES[0]]}, "lists a category id twice"),
    "a path from elsewhere": (
        {"images": [*IMAGES, {"id": 12, "file_name": __file__, "height": 40, "width": 60}]},
        r"1 of 5 images .* are not in .*, first /",
    ),
    "captions": ({"annotations": [{"image_id": 7, "caption": "a brush"}]}, "is no COCO file of instances"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_one_message(tmp_path, case):
    content, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as error:
        open_coco(write(tmp_path, {"val": content}))
    assert "\n" not in str(error.value)


def test_categories_of_one_name_are_told_apart(tmp_path):
    same = {"categories": [{"id": 90, "name": "brush"}, {"id": 1, "name": "brush"}, {"id": 4, "name": "cup"}]}
    assert open_coco(write(tmp_path, {"train": same, "val": same})).val.class_names == (
        "brush (1)",
        "cup",
        "brush (90)",
    )


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"set data\.root"):
        open_coco(None)
    with pytest.raises(ValueError, match=r"no annotations of train; expected annotations/instances_train2017.json"):
        open_coco(tmp_path, COCO_LAYOUT)
    write(tmp_path)
    (tmp_path / "annotations" / "instances_val.json").write_text("{")
    with pytest.raises(ValueError, match=r"instances_val.json' cannot be read"):
        open_coco(tmp_path)
    nothing = {"train": {"annotations": [row for row in OBJECTS if row["image_id"] == 9]}}
    with pytest.raises(ValueError, match="no training image of 32 pixels or more with an object"):
        open_coco(write(tmp_path, nothing))


@pytest.mark.parametrize(
    ("n", "total", "share"), [(1000, 16, 0.3), (997, 8, 0.5), (50, 6, 0.2), (9, 16, 0.3), (30, 4, 0)]
)
def test_batches_have_one_orientation_and_steps_do_not_depend_on_ranks(n, total, share):
    tall = np.random.default_rng(n).random(n) < share
    order = permutation(0, 1, n)
    grouped = by_orientation(order, tall, total)
    assert sorted(grouped) == list(range(n))
    for size in (s for s in (1, 2, 4) if total % s == 0):
        batches = [grouped[start : start + size] for start in range(0, n, size)]
        mixed = [number for number, batch in enumerate(batches) if len(set(tall[batch])) > 1]
        # only where an orientation's last images fill no unit of their own, at the end
        assert not mixed or mixed[0] * size >= n - 2 * 4
    for flag in set(tall.tolist()):  # an image hardly changes its place
        places = [np.flatnonzero(tall[numbers] == flag).mean() for numbers in (order, grouped)]
        assert abs(places[0] - places[1]) < total + 8


def test_demo_scenes_are_what_they_say(tmp_path):
    splits = open_coco(demo_detection_root(tmp_path / "scenes"), COCO_LAYOUT)
    assert (len(splits.train), len(splits.val)) == (COUNTS["train"], COUNTS["val"])
    assert splits.train.class_names == tuple("0123456789")
    assert set(splits.train.labels.tolist()) == set(range(10))
    assert {tuple(size) for size in splits.train.sizes.tolist()} == {(96, 128), (128, 96)}
    for index in (0, 1, len(splits.val) - 1):
        picture = np.asarray(Image.open(splits.val.paths[index]).convert("L")).astype(float)
        assert picture.shape == tuple(splits.val.sizes[index])
        objects = splits.val.objects(index)
        for box, mask in zip(objects.boxes, bitmaps(objects.masks, *picture.shape), strict=True):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            x0, y0, x1, y1 = box.astype(int)
            around = picture[y0:y1, x0:x1][mask[y0:y1, x0:x1] == 0]
            assert abs(picture[mask == 1].mean() - around.mean()) > 20  # ink stands out from the canvas
