"""Pictures of one channel and of many bands: model.in_chans, from the files to the predictions."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from programs import in_process
from reliability import command, write_images

import data
import involution
from data.bands import decode_bands
from data.decode import BadImageError
from involution.loading import evaluation_transform
from scripts import check_dataset

GRAY = ["model.in_chans=1", "data.mean=[0.449]", "data.std=[0.226]"]
SHORT = ["train.max_steps=1", "data.loader=torch", "data.workers=0"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_loaders_make_the_gray_that_pillow_makes(images, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    split = data.open_dataset("folder", str(images), None).val
    transform = evaluation_transform(32, 36, [0.4], [0.2])
    expected = torch.stack([transform(Image.open(path)) for path in split.paths])
    assert expected.shape == (18, 1, 32, 32)
    loaded = data.eval_loader(
        split, batch_size=18, val_size=32, val_resize=36, mean=[0.4], std=[0.2], loader=loader, workers=1
    )
    (batch,) = loaded
    loaded.close()
    torch.testing.assert_close(batch.images, expected, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="a value for each channel"):
        data.eval_loader(split, batch_size=18, mean=[0.4, 0.4], std=[0.2])


def test_a_gray_model_trains_evaluates_and_predicts(images, tmp_path):
    program, *arguments = command(tmp_path / "run", images, *SHORT, *GRAY)[1:]
    trained = in_process(program, *arguments)
    assert trained.status == 0, trained.stderr
    checkpoint = f"checkpoint={tmp_path}/run"
    assert involution.load(tmp_path / "run").model.stem.conv1.in_channels == 1
    assert in_process("eval.py", checkpoint, "device=cpu").status == 0
    photo = next((images / "val" / "a").iterdir())
    sheet = tmp_path / "sheet.png"
    assert in_process("eval.py", checkpoint, "device=cpu", f"images={photo}", f"contact_sheet={sheet}").status == 0
    assert sheet.exists()
    for wrong in (["data.mean=[0.5,0.5,0.5]"], [f"images={photo}", "data.mean=[0.5,0.5,0.5]", "data.std=[1,1,1]"]):
        refused = in_process("eval.py", checkpoint, "device=cpu", *wrong)
        assert refused.status == 2
        assert "the model's channels, 1" in refused.stderr
        assert "Traceback" not in refused.stderr


BANDS = ["model.in_chans=4", "data.mean=[0.4,0.4,0.4,0.3]", "data.std=[0.2,0.2,0.2,0.2]"]


@pytest.fixture(scope="module")
def satellite(tmp_path_factory) -> Path:
    """Three classes of pictures of 16 bits in four bands: 45 to train on, 18 to validate; one is a PNG of 8 bits."""
    root = write_images(tmp_path_factory.mktemp("images") / "bands")
    for i, path in enumerate(sorted(root.rglob("*.jpg"))):
        picture = np.asarray(Image.open(path))
        pixels = np.dstack([picture, 255 - picture[..., :1]])
        path.unlink()
        if i == 0:
            Image.fromarray(pixels, "RGBA").save(path.with_suffix(".png"))
        else:
            stored = pixels.astype(np.uint16) * 200
            tifffile.imwrite(path.with_suffix(".tif"), stored, photometric="minisblack", planarconfig="contig")
    return root


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("layout", ["beside each other", "one after the other", "pages", "unsaid"])
def test_bands_are_read_from_any_place(layout, dtype, tmp_path):
    full = {"uint8": 255, "uint16": 65535, "float32": 1.0}[dtype]
    pixels = (np.random.default_rng(0).random((7, 9, 5)) * full).astype(dtype)
    path = tmp_path / "picture.tif"
    planes = pixels.transpose(2, 0, 1)
    if layout == "pages":
        with tifffile.TiffWriter(path) as file:
            for plane in planes:
                file.write(plane, contiguous=True, photometric="minisblack")
    elif layout == "unsaid":
        tifffile.imwrite(path, pixels, photometric="minisblack")
    else:
        planar = None if layout == "beside each other" else "separate"
        stored = pixels if planar is None else planes
        tifffile.imwrite(path, stored, photometric="minisblack", planarconfig=planar or "contig")
    read = decode_bands(path.read_bytes(), "here", 5)
    np.testing.assert_allclose(read.numpy(), pixels * (255 / full), rtol=1e-6)
    with pytest.raises(BadImageError, match=r"'here'.*it has (5|7) channels, and the model takes 13"):
        decode_bands(path.read_bytes(), "here", 13)
    with pytest.raises(BadImageError, match=r"9 x 7 pixels, more than the limit"):
        decode_bands(path.read_bytes(), "here", 5, max_pixels=62)


@pytest.mark.parametrize("damage", ["empty", "cut", "integers", "nan", "text"])
def test_files_without_bands_are_named(damage, tmp_path):
    path = tmp_path / "picture.tif"
    values = {"integers": np.zeros((4, 4, 5), np.int32), "nan": np.full((4, 4, 5), np.nan, np.float32)}
    tifffile.imwrite(path, values.get(damage, np.zeros((64, 64, 5), np.uint8)), photometric="minisblack")
    content = {"empty": b"", "cut": path.read_bytes()[:2000], "text": b"no picture"}.get(damage, path.read_bytes())
    with pytest.raises(BadImageError, match="here"):
        decode_bands(content, "here", 5)


def test_the_loader_gives_as_many_channels(satellite):
    split = data.open_dataset("folder", str(satellite), None).val
    normalisation = {"mean": [0.4, 0.4, 0.4, 0.3], "std": [0.2] * 4}
    transform = evaluation_transform(32, 36, **normalisation)
    files = [decode_bands(Path(path).read_bytes(), path, 4).permute(2, 0, 1) / 255 for path in split.paths]
    loaded = data.eval_loader(split, batch_size=18, val_size=32, val_resize=36, **normalisation, workers=0)
    (batch,) = loaded
    torch.testing.assert_close(batch.images, torch.stack([transform(file) for file in files]), rtol=0, atol=1e-5)
    long = torch.rand(4, 2, 20000)
    assert transform(long).shape == (4, 32, 32)


def test_a_model_of_bands_trains_evaluates_and_predicts(satellite, tmp_path):
    mixed = ["augmentation.erasing=0.5", "augmentation.mixup=0.2"]
    program, *arguments = command(tmp_path / "run", satellite, *SHORT, *BANDS, *mixed)[1:]
    trained = in_process(program, *arguments)
    assert trained.status == 0, trained.stderr
    checkpoint = f"checkpoint={tmp_path}/run"
    assert involution.load(tmp_path / "run").model.stem.conv1.in_channels == 4
    assert in_process("eval.py", checkpoint, "device=cpu").status == 0
    sheet = tmp_path / "sheet.png"
    shown = in_process("eval.py", checkpoint, "device=cpu", f"images={satellite}/val", f"contact_sheet={sheet}")
    assert shown.status == 0, shown.stderr
    assert sheet.exists()
    for wrong, said in (
        (["data.loader=dali"], "use data.loader=torch"),
        (["augmentation.randaugment=9"], "color_jitter are for colours: leave them out"),
        (["augmentation.randaugment=rand-m7-mstd0.5-inc1"], "color_jitter are for colours: leave them out"),
        (
            ["model.in_chans=5", "data.mean=[0,0,0,0,0]", "data.std=[1,1,1,1,1]"],
            "it has 4 channels, and the model takes 5",
        ),
    ):
        refused = in_process(program, *arguments, "train.resume=never", "name=wrong", *wrong)
        assert refused.status == 2, refused.stderr
        assert said in refused.stderr
        assert "Traceback" not in refused.stderr


def test_the_scan_finds_files_of_other_bands(satellite, images, tmp_path, capsys):
    mixed = tmp_path / "mixed"
    shutil.copytree(satellite, mixed)
    shutil.copy(next((images / "val" / "a").iterdir()), mixed / "val" / "a" / "colours.jpg")
    assert check_dataset.main([str(mixed), "--workers", "1", "--channels", "4"]) == 1
    assert "colours.jpg: it has 3 channels, and the model takes 4" in capsys.readouterr().out
    assert check_dataset.main([str(satellite), "--workers", "1", "--channels", "4"]) == 0
