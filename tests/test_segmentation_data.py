"""Pictures with masks: what is read, refused, and how a training crop is made."""

import colorsys
import io
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from data import segmentation
from data.cityscapes import CITYSCAPES, IDS, PICTURE, TRAIN_IDS, open_cityscapes
from data.decode import decode
from data.mask_list import IGNORED, BadMaskError, open_folder, open_split
from data.sampling import Plan
from involution.engine.tasks.overlays import Overlays
from involution.engine.tasks.segmented_pictures import LabelFiles, label_names

SIZE = (12, 16)


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


@pytest.fixture
def city(tmp_path):
    """Two frames to train on, whose masks have label ids."""
    for name in ("a_0_0", "a_1_0"):
        save(tmp_path / "leftImg8bit/train/a" / (name + PICTURE), np.zeros((*SIZE, 3)))
        save(tmp_path / "gtFine/train/a" / (name + IDS), np.full(SIZE, 7))
    return tmp_path


def test_label_ids_and_train_ids_give_the_same_classes(city):
    """Complaint 14."""
    mask = city / "gtFine/train/a" / ("a_0_0" + IDS)
    ids = np.arange(SIZE[0] * SIZE[1]).reshape(SIZE) % 34
    ids[0, 0] = 255  # a licence plate
    save(mask, ids)
    train, val = open_cityscapes(city)
    assert (len(train), len(val)) == (2, 0)
    _, classes = train.read(0)
    assert classes[0, 0] == IGNORED
    assert classes[0, 7] == 0  # road
    assert set(np.unique(classes)) == {*range(19), IGNORED}
    assert (CITYSCAPES.values[classes[classes != IGNORED]] == ids[classes != IGNORED]).all()
    for name in ("a_0_0", "a_1_0"):
        save(mask.with_name(name + TRAIN_IDS), classes)
    (again, _), _ = open_cityscapes(city)[0].read(0), None
    assert again.size == (SIZE[1], SIZE[0])
    assert (open_cityscapes(city)[0].read(0)[1] == classes).all()


def test_a_foreign_value_names_its_file(city):
    """Complaint 14."""
    save(city / "gtFine/train/a" / ("a_1_0" + IDS), np.full(SIZE, 77))
    with pytest.raises(BadMaskError, match=r"a_1_0_gtFine_labelIds.png' has the value 77.*0-33, 255 are"):
        open_cityscapes(city)[0].read(1)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda mask: mask.unlink(), r"1 of 2 pictures have no mask.*a_1_0_leftImg8bit.png"),
        (lambda mask: save(mask, np.zeros((5, 16))), "has 16 x 5 pixels, its image 16 x 12"),
        (lambda mask: Image.open(mask).convert("P").save(mask), "has a palette"),
        (lambda mask: Image.open(mask).convert("RGBA").save(mask), "has colours"),
    ],
    ids=["missing", "size", "palette", "colours"],
)
def test_pairs_that_do_not_fit_are_refused(city, spoil, message):
    spoil(city / "gtFine/train/a" / ("a_1_0" + IDS))
    with pytest.raises(ValueError, match=message):
        open_cityscapes(city)


def test_a_folder_of_images_and_masks(tmp_path):
    for split in ("train", "val"):
        save(tmp_path / split / "images" / "b" / "x.jpg", np.zeros((*SIZE, 3)))
        save(tmp_path / split / "masks" / "b" / "x.png", np.eye(*SIZE))
    train, val = open_folder(tmp_path, ["sky", "sea"])
    assert val.read(0)[1].sum() == 12
    assert train.fingerprint != open_folder(tmp_path, ["sea", "sky"])[0].fingerprint
    with pytest.raises(ValueError, match=r"data\.classes is not set"):
        open_folder(tmp_path, None)
    with pytest.raises(BadMaskError, match="has the value 1, which is no label"):
        open_folder(tmp_path, ["sky"])[1].read(0)
    save(tmp_path / "train" / "masks" / "b" / "x.png", 255 * np.eye(*SIZE))
    with pytest.raises(ValueError, match=r"hold 0 and 255 alone.*write 1 for 'sea'"):
        open_folder(tmp_path, ["sky", "sea"])
    save(tmp_path / "train" / "images" / "b" / "y.jpg", np.zeros((*SIZE, 3)))
    save(tmp_path / "train" / "masks" / "b" / "y.png", np.eye(*SIZE))  # the others may have nothing but ignored pixels
    assert len(open_folder(tmp_path, ["sky", "sea"])[0]) == 2
    shutil.rmtree(tmp_path / "train")
    assert open_split(tmp_path, ["sky", "sea"], "val").fingerprint == val.fingerprint  # all that eval.py needs


def test_pictures_are_turned_as_cameras_say_where_their_masks_are(tmp_path):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:6] = 255
    upright = Image.fromarray(pixels)
    for split in ("train", "val"):
        save(tmp_path / split / "masks" / "x.png", pixels[:, :, 0] > 0)
    for orientation, stored in (
        (1, upright),
        (3, upright.rotate(180)),
        (6, upright.transpose(Image.Transpose.ROTATE_90)),
    ):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for split in ("train", "val"):
            (tmp_path / split / "images").mkdir(exist_ok=True)
            stored.save(tmp_path / split / "images" / "x.png", exif=exif)
        picture, classes = open_folder(tmp_path, ["dark", "light"])[0].read(0)
        assert np.array_equal(np.asarray(picture)[:, :, 0] > 0, classes == 1), orientation


@pytest.mark.parametrize(("dtype", "top"), [(np.uint16, 65535), (np.float32, 1)])
def test_pictures_of_more_than_8_bits_are_scaled_not_cut_off(dtype, top):
    ramp = np.linspace(0, top, 256).round(0 if top > 1 else 7).astype(dtype).reshape(16, 16)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "TIFF")
    found = np.asarray(decode(stream.getvalue(), "ramp.tif", annotated=(16, 16)))
    assert found[..., 0].ravel().tolist() == list(range(256))


def test_files_that_cannot_be_read_are_the_loaders_where_they_are_to_be_skipped(city):
    (city / "leftImg8bit/train/a/a_1_0_leftImg8bit.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="or its mask cannot be read"):
        open_cityscapes(city)
    train, _ = open_cityscapes(city, on_error="skip")
    assert len(train) == 2
    gallery = Overlays(train, [0.5] * 3, [0.2] * 3, None)
    assert len(gallery.samples) == 1
    assert Overlays(train.select([1]), [0.5] * 3, [0.2] * 3, None).draw(torch.nn.Linear(1, 1)) == {}


def test_label_files_have_names_of_their_own(tmp_path):
    assert label_names(["/a/x/1.jpg", "/a/x/2.jpg"]) == ["1", "2"]
    assert label_names(["/a/x/1.jpg", "/a/y/1.jpg"]) == ["x/1", "y/1"]
    assert label_names(["/a/x/1.jpg", "/a/x/1.png"]) == ["1.jpg", "1.png"]
    files = LabelFiles(str(tmp_path / "labels"), range(3))
    for name in ("x/1", "y/1"):
        files.write(name, torch.ones(2, 2, dtype=torch.int64))
    assert len(list((tmp_path / "labels").rglob("*.png"))) == 2


def test_the_real_layouts_are_read(camvid):
    train, val = open_cityscapes(camvid)
    assert (len(train), len(val)) == (14, 6)
    image, classes = train.read(3)
    assert image.size == classes.shape[::-1]
    assert set(np.unique(classes)) <= {*range(19), IGNORED}


def augmentation(**changed):
    settings = {
        "seed": 3, "size": (8, 8), "scale": (1.0, 1.0), "max_class_share": 0.75, "flip": 0.5, "photometric": True,
        "fill": (9, 9, 9),
    }  # fmt: skip
    return segmentation.MaskAugmentation(**settings | changed)


def test_picture_and_mask_are_cut_alike():
    random = np.random.default_rng(0)
    classes = random.integers(0, 9, (20, 30)).astype(np.uint8)
    image = Image.fromarray(np.repeat(20 * classes[..., None], 3, 2))
    draws = augmentation().draws(1, np.arange(20))
    for draw in draws.tolist():
        picture, mask = augmentation().cut(image, classes, draw)
        assert (picture[..., 0] == 20 * mask).all()
    small, labels = augmentation(size=(24, 40), flip=0.0).cut(image, classes, draws[0].tolist())
    assert (labels[:20, :30].numpy() == classes).all()
    assert (labels[20:] == IGNORED).all()
    assert (small[:, 30:] == 9).all()


def test_a_crop_that_one_class_fills_is_drawn_again():
    classes = np.zeros((32, 32), np.uint8)
    classes[:, 24:] = 1
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    shares = [
        (augmentation(max_class_share=limit).cut(image, classes, draw)[1] == 0).float().mean().item()
        for limit in (1.0, 0.75)
        for draw in augmentation().draws(0, np.arange(60)).tolist()
    ]
    any_crop, redrawn = sum(share > 0.75 for share in shares[:60]), sum(share > 0.75 for share in shares[60:])
    assert any_crop > 30
    assert redrawn < 10  # the last of ten crops is taken as it is


def test_saturation_is_that_of_hsv():
    picture = torch.rand(4, 5, 3) * 255
    for factor in (0.5, 1.4):
        expected = []
        for r, g, b in picture.reshape(-1, 3).tolist():
            h, s, v = colorsys.rgb_to_hsv(r, g, b)
            expected.append(colorsys.hsv_to_rgb(h, min(1.0, s * factor), v))
        found = segmentation.saturate(picture, factor)
        torch.testing.assert_close(found.reshape(-1, 3), torch.tensor(expected), rtol=1e-4, atol=1e-3)


def test_batches_are_functions_of_seed_epoch_and_sample(tmp_path):
    random = np.random.default_rng(0)
    for i in range(10):
        size = (20 + i, 30)
        save(tmp_path / f"leftImg8bit/train/a/a_{i}_0{PICTURE}", random.integers(0, 256, (*size, 3)))
        save(tmp_path / f"gtFine/train/a/a_{i}_0{TRAIN_IDS}", random.integers(0, 19, size))
    kept, _ = open_cityscapes(tmp_path)

    def loader(workers, batch_size, rank, world_size):
        transform = augmentation(size=(32, 48), scale=(0.5, 2.0))
        settings = segmentation.MaskSettings(kept, transform, [0.5] * 3, [0.5] * 3, torch.device("cpu"), workers)
        plan = Plan(10, batch_size, 4, rank, world_size)
        return segmentation.train_loader(settings, plan, 3, "stop")

    whole = loader(0, 4, 0, 1)
    batches = [next(whole) for _ in range(4)]
    assert [batch.valid for batch in batches] == [4, 4, 2, 4]
    for rank in (0, 1):
        half = loader(1 - rank, 2, rank, 2)
        half.seek(1)
        for expected in batches[1:]:
            found = next(half)
            rows = slice(2 * rank, 2 * rank + 2)
            assert torch.equal(found.images, expected.images[rows])
            assert torch.equal(found.masks, expected.masks[rows])
        half.close()
