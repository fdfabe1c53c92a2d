"""Starting from weights: `train.py checkpoint=...`, with a new classifier, frozen parts, and a restart that resumes."""

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from programs import finish, in_process, kill, start
from reliability import command, outcome, saved_step, wait_until, write_images

import involution
from involution.engine.finetune import start_from
from involution.export import save_safetensors
from involution.weights import to_released
from involution.weights.run_file import read

# the settings of reliability.py, where a course can be killed, under the recipe
TUNE = ["recipe=finetune", "data.loader=torch", "model.kernel_size=3", "train.freeze=1", "train.epochs=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes."""
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Weights alone, released layout, of five classes."""
    torch.manual_seed(0)
    model = involution.create_model("rednet26", num_classes=5, kernel_size=3)
    for name, value in model.named_buffers():  # statistics as of a trained model
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
    path = tmp_path_factory.mktemp("weights") / "released.pth"
    torch.save({"state_dict": to_released(model.state_dict())}, path)
    return path


@pytest.fixture(scope="module")
def tuned(images, weights, tmp_path_factory) -> Path:
    """A run from the weights, stem and first stage frozen, that nothing happened to."""
    run = tmp_path_factory.mktemp("runs") / "tuned"
    finished = finish(start(command(run, images, *TUNE, f"checkpoint={weights}")))
    assert finished.status == 0, finished.stderr
    assert "starting from the weights" in finished.stderr
    assert "the weights have no classifier for 3 classes: it starts afresh" in finished.stderr
    assert "frozen: stem, layer1" in finished.stderr
    return run


def test_what_is_frozen_keeps_every_bit_and_the_rest_learns(tuned, weights):
    state = read(tuned / "checkpoints" / "last.pt")
    before = involution.load(weights).model.state_dict()
    assert state["model"]["fc.weight"].shape == (3, 2048)
    frozen = [key for key in before if key.startswith(("stem.", "layer1."))]
    assert any("running_mean" in key for key in frozen)
    assert all(torch.equal(state["model"][key], before[key]) for key in frozen), "statistics included"
    learning = [key for key in before if not key.startswith(("stem.", "layer1.", "fc."))]
    assert all(not torch.equal(state["model"][key], before[key]) for key in learning if "num_batches" not in key)
    trained = [key for key, _ in involution.load(tuned).model.named_parameters() if key not in frozen]
    assert sum(len(group["params"]) for group in state["optimizer"]["param_groups"]) == len(trained)


@pytest.mark.slow
def test_killed_and_started_again_without_the_weights_it_ends_bit_equal(tuned, images, weights, tmp_path):
    moved = tmp_path / weights.name
    moved.write_bytes(weights.read_bytes())
    words = command(tmp_path / "run", images, *TUNE, f"checkpoint={moved}", "train.checkpoint_every_minutes=0")
    process = start(words)
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, process)
    kill(process)
    moved.unlink()  # the run's own state wins, so they are not even read
    finished = finish(start(words))
    assert finished.status == 0, finished.stderr
    assert "going on from" in finished.stderr
    assert outcome(tmp_path / "run") == outcome(tuned)


def test_other_weights_in_the_same_folder_are_another_run(tuned, images, tmp_path):
    saved = yaml.safe_load((tuned / "config.yaml").read_text())["checkpoint"]
    program, *arguments = command(tuned, images, *TUNE, "checkpoint=other.pth")[1:]
    finished = in_process(program, *arguments)
    assert finished.status == 2
    assert f"checkpoint was {saved}, is other.pth" in finished.stderr
    assert "belongs to another run. Give this one another name=, or" in finished.stderr
    other = in_process(program, *arguments, "model=rednet38")
    assert other.status == 2, other.stderr
    assert "resume=never. What differs: model.name was rednet26, is rednet38; checkpoint was " in other.stderr
    assert "missing: layer1.1.conv1.weight, layer1.1.bn1.weight and 98 more" in other.stderr


def test_the_next_folder_is_another_run(tuned, images, weights, tmp_path):
    """Of one default name: it would have been the first folder's result. The same pictures elsewhere are not."""
    fewer, others, moved = (shutil.copytree(images, tmp_path / name) for name in ("fewer", "others", "moved"))
    next((fewer / "train").rglob("*.jpg")).unlink()
    for split in ("train", "val"):
        min((others / split).iterdir()).rename(others / split / "zebra")
    for folder, status, said in (
        (fewer, 2, f"data.root was {images}, is {fewer}"),
        (others, 2, "the list of classes was a, b, c (3), is b, c, zebra (3)"),
        (moved, 0, f"continuing with data.root={moved}, which was {images}"),
    ):
        program, *arguments = command(tuned, folder, *TUNE, f"checkpoint={weights}")[1:]
        finished = in_process(program, *arguments)
        assert finished.status == status, finished.stderr
        assert said in finished.stderr


def test_a_classifier_is_kept_for_the_same_classes_and_new_for_others(tuned, images, tmp_path):
    loaded = involution.load(tuned)
    save_safetensors(loaded.model, tmp_path, ["cat", "b", "newt"])
    torch.save(loaded.model.state_dict(), tmp_path / "nameless.pth")
    short = ["train.max_steps=1", "train.freeze=[stem,layer1,layer2,layer3,layer4]", "optimizer.lr=0"]
    for checkpoint, said, kept in (
        (tuned, "the classifier for 3 classes is kept (a, b, c)", True),
        (tmp_path / "nameless.pth", "is kept, for the weights do not tell the names of theirs", True),
        (tmp_path / "model.safetensors", "(cat, b, newt; of the 3 here 2 are new to it), so it starts afresh", False),
    ):
        run = tmp_path / f"from-{checkpoint.stem}"
        program, *arguments = command(run, images, *TUNE, *short, f"checkpoint={checkpoint}")[1:]
        finished = in_process(program, *arguments)
        assert finished.status == 0, finished.stderr
        assert said in finished.stderr
        state = read(run / "checkpoints" / "last.pt")["model"]
        assert torch.equal(state["layer1.0.conv1.weight"], loaded.model.layer1[0].conv1.weight)
        assert torch.equal(state["fc.weight"], loaded.model.fc.weight) == kept


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (
            ["model.kernel_size=7", "checkpoint={weights}"],
            [
                "layer1.0.conv2.kernel_generation.span.weight (36, 16, 1, 1) instead of (196, 16, 1, 1)",
                "It was trained with model.kernel_size=3: add that",
            ],
        ),
        (
            ["model=resnet26", "checkpoint={weights}"],
            ["unexpected: ", "It was trained with model=rednet26 model.stem=involution"],
        ),
        ([], ["checkpoint is not set; give it as checkpoint=PATH"]),
        (["checkpoint=nowhere.pth"], ["there is no file nowhere.pth"]),
        (["checkpoint=README.md"], ["README.md cannot be read as weights: torch.save did not write it"]),
        (["checkpoint={weights}", "train.freeze=5"], ["train.freeze=5", "from 0 to 4"]),
        (["checkpoint={weights}", "train.freeze=[layer9]"], ["did you mean 'layer"]),
        (["checkpoint={weights}", "train.freeze=[stem,layer1,layer2,layer3,layer4,fc]"], ["leaves nothing to train"]),
    ],
)
def test_what_cannot_start_says_why(images, weights, tmp_path, arguments, messages):
    arguments = [argument.format(weights=weights) for argument in arguments]
    settings = [word for word in TUNE if "kernel_size" not in word or "model=resnet26" not in arguments]
    program, *rest = command(tmp_path / "run", images, *settings, *arguments)[1:]
    finished = in_process(program, *rest)
    assert finished.status == 2, finished.stderr
    assert all(message in finished.stderr for message in messages), finished.stderr
    assert "Traceback" not in finished.stderr


def test_frozen_parts_of_a_model():
    model = involution.create_model("rednet26", num_classes=2)
    model.freeze(0)
    assert model.frozen == ("stem",)
    model.train()
    assert not any(module.training for module in model.stem.modules())
    assert model.layer1.training
    assert not any(parameter.requires_grad for parameter in model.stem.parameters())
    model.freeze(["layer4"])
    assert not model.layer4.training
    for wrong in (True, -1, 5, ["head"]):
        with pytest.raises(ValueError, match="freeze"):
            model.freeze(wrong)


def test_a_classifier_starts_from_the_backbone_of_a_detector(tmp_path):
    torch.manual_seed(0)
    detector = involution.create_model("retinanet", num_classes=3, backbone={"name": "rednet26", "stem_kernel_size": 3})
    torch.save(detector.state_dict(), file := tmp_path / "detector.pth")
    fresh, pretrained = involution.create_model("rednet26", 4), involution.create_model("rednet26", 4, pretrained=file)
    start_from(fresh, {"name": "rednet26"}, str(file), None, ["a", "b", "c", "d"])
    for key, value in detector.backbone.state_dict().items():
        for model in (fresh, pretrained):
            assert torch.equal(model.state_dict()[key.removeprefix("net.")], value), key

    wide = involution.create_model("rednet26", 4, stem_kernel_size=7)
    with pytest.raises(ValueError, match=r"It was trained with model\.stem_kernel_size=3: add that"):
        start_from(wide, {"name": "rednet26"}, str(file), None, ["a", "b", "c", "d"])
    with pytest.raises(ValueError, match="They were trained with stem_kernel_size=3"):
        involution.create_model("rednet26", 4, stem_kernel_size=7, pretrained=file)
