"""Pictures of one channel: model.in_chans=1, from the files to the predictions."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import in_process
from reliability import command, write_images

import data
import involution
from involution.loading import evaluation_transform

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
    with pytest.raises(ValueError, match="3 values, or 1 for gray"):
        data.eval_loader(split, batch_size=18, mean=[0.4, 0.4], std=[0.2, 0.2])


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
