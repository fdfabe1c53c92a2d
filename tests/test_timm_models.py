"""`model=timm`: any model of timm's in the programs, and timm's options in ours."""

from pathlib import Path

import pytest
import torch
from programs import Finished, in_process
from reliability import SETTINGS, write_images

import involution
from involution.engine.config import given
from involution.export import export_program, save_safetensors
from involution.loading import open_checkpoint
from involution.models import from_timm
from involution.models.bottleneck import drop_path
from involution.visualize import find_layer
from involution.weights.run_file import digest, read

# the settings of reliability.py, with sizes left to the model where a test wants that
SMALL = [word for word in SETTINGS if not word.startswith(("model=", "data.train", "data.val", "train.ema"))]
SIZES = ["data.train_size=32", "data.val_size=32", "data.val_resize=32"]
FAMILIES = {
    "resnet10t": [*SIZES, "model.in_chans=1", "model.convert={kernel_size: 3, skip: [conv1]}"],
    "convnext_atto": [*SIZES, "model.options={drop_path_rate: 0.1}", "train.freeze=[stem]"],
    "vit_tiny_patch16_224": ["model.options={img_size: 32}"],
    "efficientnet_lite0": ["recipe=rsb_a2", "data.train_size=32", "data.val_size=32"],
    "mobilenetv3_small_050": [*SIZES, "train.ema_decay=0.9"],
}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes."""
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


def train(images: Path, output: Path, name: str, *words: str) -> Finished:
    place = [f"data.root={images}", f"output_root={output}", "data.loader=torch"]
    return in_process("train.py", "model=timm", f"model.name={name}", *SMALL, *place, "train.max_steps=1", *words)


@pytest.fixture(scope="module")
def runs(images, tmp_path_factory) -> Path:
    """A run of a step in each family."""
    folder = tmp_path_factory.mktemp("runs")
    for name, words in FAMILIES.items():
        finished = train(images, folder, name, f"name={name}", *words)
        assert finished.status == 0, finished.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_evaluates_loads_and_leaves_as_safetensors(name, runs, images, tmp_path):
    run = runs / name
    state = read(run / "checkpoints" / "last.pt")
    data = state["config"]["data"]
    side = from_timm.preparation(**state["config"]["model"])
    assert data["train_size"] == data["val_size"] == 32
    mean, std = ([0.449], [0.226]) if name == "resnet10t" else (side["mean"], side["std"])
    assert (data["mean"], data["std"]) == (mean, std), "of the model, in one channel their average"
    finished = in_process("eval.py", f"checkpoint={run}", "device=cpu", "batch_size=18")
    assert finished.status == 0, finished.stderr
    assert finished.stdout.count('"n": 18') == 1

    opened, classifier = open_checkpoint(run), involution.load(run)
    assert classifier.class_names == ("a", "b", "c")
    assert (find_layer(classifier.model) is not None) == ("convert" in str(FAMILIES[name])), "heat maps of involutions"
    pixels = torch.randn(2, classifier.model.in_chans, 32, 32)
    save_safetensors(opened.model, tmp_path, opened.class_names, preparation=data, arguments=opened.arguments)
    again = involution.load(tmp_path / "model.safetensors")
    assert repr(again.transform) == repr(classifier.transform)
    with torch.no_grad():
        assert torch.equal(again.model(pixels), classifier.model(pixels))


def test_timm_files_of_other_channels_and_classes_start_a_model(tmp_path):
    source = involution.create_model("resnet10t", library="timm", num_classes=7)
    torch.save({"state_dict": source.state_dict()}, tmp_path / "weights.pth")
    model = involution.create_model("resnet10t", 2, tmp_path / "weights.pth", library="timm", in_chans=1)
    torch.testing.assert_close(model.conv1[0].weight, source.conv1[0].weight.sum(1, keepdim=True))
    assert torch.equal(model.layer4[0].conv1.weight, source.layer4[0].conv1.weight)
    assert model.fc.weight.shape == (2, 512)
    with pytest.raises(ValueError, match="the weights are of another model"):
        involution.create_model("convnext_atto", pretrained=tmp_path / "weights.pth", library="timm")


@pytest.mark.slow
def test_fine_tuning_from_a_run_and_from_a_file_of_weights(runs, images, tmp_path):
    state = read(runs / "convnext_atto" / "checkpoints" / "last.pt")["model"]
    torch.save(state, tmp_path / "nameless.pth")
    for checkpoint in (runs / "convnext_atto", tmp_path / "nameless.pth"):
        short = [*SIZES, "train.freeze=[stem,stages]", "optimizer.lr=0", f"checkpoint={checkpoint}"]
        finished = train(images, tmp_path, "convnext_atto", f"name={checkpoint.stem}", *short)
        assert finished.status == 0, finished.stderr
        assert "the classifier for 3 classes is kept" in finished.stderr
        assert "frozen: stem, stages; 0.00 M parameters train" in finished.stderr
        tuned = read(tmp_path / checkpoint.stem / "checkpoints" / "last.pt")["model"]
        assert all(torch.equal(tuned[key], state[key]) for key in state)
    refused = train(images, tmp_path, "resnet10t", *SIZES, f"checkpoint={runs / 'convnext_atto'}")
    assert (refused.status, "It was trained with model=timm model.name=convnext_atto" in refused.stderr) == (2, True)


def test_frozen_modules_keep_their_statistics():
    model = involution.create_model("resnet10t", num_classes=2, library="timm")
    from_timm.freeze(model, ["conv1", "bn1"])
    before = model.bn1.running_mean.clone(), model.layer1[0].bn1.running_mean.clone()
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert torch.equal(model.bn1.running_mean, before[0])
    assert not torch.equal(model.layer1[0].bn1.running_mean, before[1])
    assert model.conv1[0].weight.grad is None


@pytest.mark.parametrize(
    ("name", "words", "messages"),
    [
        ("convnext_tinny", [], ["has no model 'convnext_tinny'; did you mean 'convnext_tiny'?"]),
        ("convnext_tiny.in1", [], ["unknown configuration of convnext_tiny 'in1'; did you mean "]),
        ("", [], ["model.name is not set; give it as model.name=NAME"]),
        ("convnext_atto", ["model.options={drop_path_rat: 0.1}"], ["did you mean 'drop_path_rate'?"]),
        ("convnext_atto", ["model.options=3"], ["options of convnext_atto is 3; it should be a mapping"]),
        ("convnext_atto", ["model.options={in_chans: 1}"], ["has in_chans, which is a key of its own"]),
        ("convnext_atto", ["model.kernel_size=5"], ["there is no key model.kernel_size"]),
        ("convnext_atto", ["train.freeze=1"], ["no module 1; name them, for example train.freeze=[stem]"]),
        ("convnext_atto", ["model.pretrained=nowhere.pth"], ["there is no file nowhere.pth"]),
        (
            "vit_tiny_patch16_224",
            SIZES,
            ["vit_tiny_patch16_224 does not take pictures of 32 pixels", "data.train_size=224", "img_size: 32"],
        ),
    ],
)
def test_what_cannot_be_made_says_why(images, tmp_path, name, words, messages):
    finished = train(images, tmp_path, name, *words)
    assert finished.status == 2, finished.stderr
    assert all(message in finished.stderr for message in messages), finished.stderr
    assert "Traceback" not in finished.stderr
    assert not given(words) & {"train.freeze"} or not (tmp_path / "checkpoints").exists()


def test_evaluation_at_a_size_that_does_not_fit_is_refused(runs):
    finished = in_process("eval.py", f"checkpoint={runs / 'vit_tiny_patch16_224'}", "data.val_size=48", "device=cpu")
    assert finished.status == 2
    assert "does not take pictures of 48 pixels" in finished.stderr


def test_stochastic_depth_leaves_branches_out_and_keeps_the_mean():
    torch.manual_seed(0)
    dropped = drop_path(torch.ones(4000, 2, 3, 3), 0.25)
    assert sorted(dropped.unique().tolist()) == pytest.approx([0, 4 / 3])
    assert torch.equal(dropped.amin((1, 2, 3)), dropped.amax((1, 2, 3))), "whole samples"
    assert dropped.mean().item() == pytest.approx(1, abs=0.03)
    model = involution.create_model("rednet26", num_classes=2, drop_path_rate=0.7, drop_rate=0.5)
    rates = [each.drop_path_rate for each in model.modules() if hasattr(each, "drop_path_rate")]
    assert rates == pytest.approx([0.1 * i for i in range(8)])
    plain = involution.create_model("rednet26", num_classes=2)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(model.eval()(torch.ones(1, 3, 32, 32)), plain.eval()(torch.ones(1, 3, 32, 32)))
    for wrong in ({"drop_path_rate": 1}, {"drop_rate": -0.1}, {"global_pool": "mean"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            involution.create_model("resnet26", **wrong)


@pytest.mark.slow
def test_a_run_with_dropped_branches_goes_on_with_the_same_bits(images, tmp_path):
    words = ["model=rednet26", "model.drop_path_rate=0.5", "model.drop_rate=0.2", "model.global_pool=avgmax", *SIZES]
    words += [*SMALL, f"data.root={images}", f"output_root={tmp_path}", "data.loader=torch"]
    for name, steps in (("straight", 2), ("stopped", 1), ("stopped", 2)):
        finished = in_process("train.py", *words, f"name={name}", f"train.max_steps={steps}")
        assert finished.status == 0, finished.stderr
    straight, stopped = (read(tmp_path / name / "checkpoints" / "last.pt") for name in ("straight", "stopped"))
    for kind in ("model", "rng"):
        assert digest(straight[kind]) == digest(stopped[kind])


def test_configurations_tell_sizes_crop_mean_and_std():
    found = from_timm.preparation("vit_tiny_patch16_224")
    assert found == {"train_size": 224, "val_size": 224, "val_resize": 248, "mean": [0.5] * 3, "std": [0.5] * 3}
    larger = from_timm.preparation("efficientnetv2_rw_t", val_size=320)
    assert (larger["train_size"], larger["val_size"], larger["val_resize"]) == (224, 320, 320)


def test_a_program_of_one_size_where_a_model_takes_no_other():
    model = involution.create_model("vit_tiny_patch16_224", num_classes=2, library="timm", options={"img_size": 32})
    with pytest.raises(ValueError, match=r"say which \(--size 224"):
        export_program(model)
    pixels = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(export_program(model, 32).module()(pixels), model.eval()(pixels))
