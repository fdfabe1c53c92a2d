"""`involution.load` and `eval.py images=...`: a checkpoint, used."""

import csv
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from models_common import fitted
from PIL import Image
from programs import ROOT, in_process, python

import involution
from data.transforms import EvalTransform
from involution.engine import load
from involution.engine.config import EvalConfig
from involution.engine.tasks import classification
from involution.export import save_safetensors
from involution.loading import evaluation_transform, open_checkpoint
from involution.weights import to_released
from involution.weights.run_file import write

NAMES = ["cat", "dog", "newt"]
PREPARATION = {"val_size": 32, "val_resize": 40, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return fitted(involution.create_model("rednet26", num_classes=3, kernel_size=3), size=32)


@pytest.fixture(scope="module")
def run(model, tmp_path_factory) -> Path:
    """The folder of a run with this model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    (folder / "checkpoints").mkdir(parents=True)
    configuration = {
        "model": {"name": "rednet26", "num_classes": 3, "kernel_size": 3},
        "data": {"name": "folder", "root": "/gone", **PREPARATION},
    }
    average = {f"module.{key}": value for key, value in model.state_dict().items()} | {"n_averaged": torch.tensor(1)}
    fresh = involution.create_model(**configuration["model"]).state_dict()
    state = {"model": fresh, "ema": average, "config": configuration, "class_names": NAMES}
    write(folder / "checkpoints" / "best.pt", state)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder with an upright picture, the same as a camera held sideways stores it, and something that is none."""
    folder = tmp_path_factory.mktemp("my photos (1)")
    pixels = np.random.default_rng(0).integers(0, 255, (4, 6, 3), np.uint8)
    picture = Image.fromarray(pixels).resize((60, 44), Image.Resampling.BICUBIC)
    picture.save(folder / "a.png")
    (folder / "deeper").mkdir()
    exif = picture.getexif()
    exif[0x0112] = 6  # turn by 90 degrees to the right to see it upright
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "deeper" / "b.PNG", exif=exif)
    (folder / "notes.txt").write_text("no picture")
    return folder


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    one, other = a.state_dict(), b.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_run_gives_its_averaged_model_its_preparation_and_its_classes(run, model):
    for checkpoint in (run, str(run / "checkpoints" / "best.pt")):
        loaded = involution.load(checkpoint)
        assert same_weights(loaded.model, model)
        assert not loaded.model.training
        assert loaded.class_names == ("cat", "dog", "newt")
        pixels = loaded.transform(Image.new("CMYK", (50, 90)))
        assert pixels.shape == (3, 32, 32)
        expected = (1 - torch.tensor(PREPARATION["mean"])) / torch.tensor(PREPARATION["std"])
        torch.testing.assert_close(pixels[:, 0, 0], expected)
    assert involution.load(run, val_size=24).transform(Image.new("L", (50, 90))).shape == (3, 24, 24)


def test_safetensors_keep_preparation_and_classes(run, model, tmp_path):
    save_safetensors(model, tmp_path, NAMES, preparation=PREPARATION)
    loaded, source = involution.load(tmp_path / "model.safetensors"), involution.load(run)
    assert same_weights(loaded.model, model)
    assert loaded.class_names == source.class_names
    assert repr(loaded.transform) == repr(source.transform)


def test_released_weights_get_the_names_and_the_preparation_of_imagenet(tmp_path):
    released = involution.create_model("rednet26")
    torch.save({"state_dict": to_released(released.state_dict())}, tmp_path / "released.pth")
    loaded = involution.load(tmp_path / "released.pth")
    assert torch.equal(loaded.model.fc.weight, released.fc.weight)
    assert (len(loaded.class_names), loaded.class_names[217]) == (1000, "English springer")
    assert loaded.transform(Image.new("RGB", (300, 400))).shape == (3, 224, 224)


def test_class_folders_of_imagenet_are_told_by_name(tmp_path):
    pytest.importorskip("timm")
    model = involution.create_model("resnet26", num_classes=3)
    save_safetensors(model, tmp_path, ["n01440764", "n02102040", "n99999999"])
    names = involution.load(tmp_path / "model.safetensors").class_names
    assert names == ("tench", "English springer", "n99999999")


def test_weights_alone_number_their_classes_and_a_backbone_has_none(tmp_path):
    torch.save(involution.create_model("resnet26", num_classes=2).state_dict(), tmp_path / "two.pth")
    assert involution.load(tmp_path / "two.pth").class_names == ("0", "1")
    torch.save(involution.create_model("resnet26", num_classes=0).state_dict(), tmp_path / "backbone.pth")
    backbone = involution.load(tmp_path / "backbone.pth")
    assert backbone.class_names == ()
    with pytest.raises(ValueError, match="no classifier"):
        backbone.predict([Image.new("RGB", (9, 9))])


@pytest.mark.parametrize("size", [(60, 44), (33, 200), (41, 41), (1, 700), (2000, 3)])
def test_the_transform_is_that_of_evaluations(size):
    picture = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size[::-1], 3), np.uint8))
    found = evaluation_transform(32, 40, (0, 0, 0), (1, 1, 1))(picture)
    expected = EvalTransform(40, 32).finish(torch.from_numpy(np.array(picture)), [], 32).permute(2, 0, 1) / 255
    if max(size) <= 8 * min(size):
        torch.testing.assert_close(found, expected)
    else:  # the ends are cut off before resizing, so pixels may lie up to half a pixel elsewhere
        assert found.shape == expected.shape


def test_what_cannot_be_loaded_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"there is no file .*best.pt: .* is no folder of a run"):
        involution.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.pt").touch()
    with pytest.raises(ValueError, match=r"has not been evaluated yet; take .*last.pt"):
        involution.load(tmp_path)
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        involution.load(tmp_path / "text.safetensors")
    (tmp_path / "model.onnx").write_text("a graph")
    with pytest.raises(ValueError, match=r"model.onnx cannot be read as weights: onnxruntime opens it"):
        involution.load(tmp_path / "model.onnx")
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as package:
        package.writestr("model/archive_format", "pt2")
    with pytest.raises(
        ValueError, match=r"cannot be read as weights: torch\.export\.load .*packages\.load a compiled one"
    ):
        involution.load(tmp_path / "model.pt2")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_model_gets_pictures_of_its_type(run, photos, dtype):
    classifier, picture = involution.load(run), Image.open(photos / "a.png")
    model = classifier.model.to(dtype)
    pixels = classifier.transform(picture)[None].to(dtype)
    for fold, network in ((False, model), (True, involution.fold(model))):
        with torch.no_grad():
            expected = network(pixels)[0].float().softmax(0).tolist()
        found = dict(classifier.predict([picture], fold=fold)[0])
        assert [found[name] for name in NAMES] == pytest.approx(expected, abs=1e-6)


def test_predictions_of_a_folder_as_text_json_and_csv(run, photos, tmp_path):
    quoted = f'images="{photos}"'
    finished = python("eval.py", f"checkpoint={run}", quoted, f"output={tmp_path}/p.json", "device=cpu")
    assert finished.status == 0, finished.stderr
    assert {key: finished.result[key] for key in ("checkpoint", "n")} == {"checkpoint": str(run), "n": 2}
    upright, turned = finished.result["predictions"]
    assert (upright["image"], turned["image"]) == (f"{photos}/a.png", f"{photos}/deeper/b.PNG")
    assert upright["top5"] == turned["top5"], "the same picture, once it is turned upright"
    loaded = involution.load(run)
    with Image.open(photos / "a.png") as picture:
        [expected] = loaded.predict([picture])
    assert [row["class"] for row in upright["top5"]] == [name for name, _ in expected]
    assert [row["confidence"] for row in upright["top5"]] == pytest.approx([p for _, p in expected], abs=1e-4)
    assert sum(row["confidence"] for row in upright["top5"]) == pytest.approx(1, abs=1e-5)
    assert f"{photos}/a.png\n  {100 * expected[0][1]:5.1f} %  {expected[0][0]}\n" in finished.stdout
    assert re.search(r"^2 pictures in [0-9.]+ s: [0-9.]+ a second$", finished.stdout, re.MULTILINE)
    assert json.loads((tmp_path / "p.json").read_text()) == finished.result["predictions"]

    outputs = (f"output={tmp_path}/p.csv", f"contact_sheet={tmp_path}/p.png")
    finished = in_process("eval.py", f"checkpoint={run}", f'images=["{photos}/a.png"]', *outputs)
    assert finished.status == 0, finished.stderr
    with Image.open(tmp_path / "p.png") as sheet:
        assert sheet.size[0] == 1800
        assert len(sheet.convert("RGB").getcolors(10**6) or []) > 100
    with open(tmp_path / "p.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [name for name, _ in expected]
    assert [row["rank"] for row in rows] == ["1", "2", "3"]

    mixed = f'images=["{photos}/notes.txt","{photos}/a.png"]'
    finished = in_process("eval.py", f"checkpoint={run}", mixed, "data.on_error=skip", "device=cpu")
    assert (finished.status, finished.result["n"]) == (0, 1), finished.stderr
    assert "notes.txt cannot be read as a picture" in finished.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=/nowhere.jpg"], "there is no file or folder /nowhere.jpg"),
        (['images="{photos}/notes.txt"'], "notes.txt cannot be read as a picture: Pillow cannot identify it"),
        (["images={run}"], "has no pictures (.jpg"),
        (["images=[]"], "images is an empty list"),
        (['images="{photos}"', "output=p.xls"], "output is p.xls; it should end with .csv or .json"),
        (['images="{photos}"', "output=/nowhere/p.csv"], "there is no folder /nowhere"),
        (['images="{photos}"', "layer=conv3_4"], "contact_sheet=FILE.png shows: give both"),
        (['images="{photos}"', "contact_sheet=p.jpg"], "contact_sheet is p.jpg; it should end with .png or .pdf"),
        (['images="{photos}"', "contact_sheet={run}/p.png", "layer=conv9_9"], "there is no involution layer conv9_9"),
        (
            ['images="{photos}"', "predictions=p.csv"],
            "predictions= is for data sets; of pictures of your own write out",
        ),
        (['images="{photos}"', "min_score=0.5"], "min_score= is for detectors"),
        (['images="{photos}"', "per_class=true"], "per_class= is for a data set, which images= goes without"),
        (["output=p.csv"], "output= is for pictures of your own, images=PATH; for each image of a data set there is"),
        (["fold=false", "data.root=/gone"], "fold= is for pictures of your own"),
        (['images="{photos}/notes.txt"', "data.on_error=skip"], "none of 1 files can be read as a picture"),
        (["images=my photo (1) = ö.jpg"], "there is no file or folder my photo (1) = ö.jpg"),
        (["images=~/no photo.jpg"], f"there is no file or folder {Path.home()}/no photo.jpg"),
    ],
)
def test_pictures_that_cannot_be_read(run, photos, arguments, message):
    arguments = [argument.format(run=run / "checkpoints", photos=photos) for argument in arguments]
    finished = in_process("eval.py", f"checkpoint={run}", *arguments, "device=cpu")
    assert finished.status == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""


def test_what_an_evaluation_takes_over_from_training(run):
    """Of another folder not the list of training's bad files; null takes it away; weights alone need a data set."""
    trained = {"name": "folder", "root": "/a", "exclude": "/a/list.txt", **PREPARATION}
    opened = open_checkpoint(run)._replace(data=trained)
    empty = yaml.safe_load((ROOT / "conf/data/as_trained.yaml").read_text())

    def taken(opened, given, **data):
        config = EvalConfig(checkpoint=str(run), data=empty | data)
        found = load._data(opened, classification, config, given)
        return found.root, found.exclude

    assert taken(opened, []) == ("/a", "/a/list.txt")
    assert taken(opened, ["data.exclude=null"]) == ("/a", None)
    assert taken(opened, ["data.root=/b"], root="/b") == ("/b", None)
    assert taken(opened, ["data.root=/b", "data.exclude=x"], root="/b", exclude="x") == ("/b", "x")
    for given, data in (([], {}), (["data.name=imagenet", "data.root=/c"], {"name": "imagenet", "root": "/c"})):
        with pytest.raises(
            ValueError, match=r"weights of rednet26 alone; say what to evaluate on: data=[\w|]+ data.root="
        ):
            taken(opened._replace(data={}), given, **data)
