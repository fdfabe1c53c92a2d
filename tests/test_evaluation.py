"""eval.py over several checkpoints, sizes and other classes; averages of checkpoints; the help text."""

import csv
import json
import platform
import re
import sys
from pathlib import Path

import pytest
import torch
from models_common import fitted
from programs import in_process, start
from reliability import write_images
from torch import nn

import involution
from data import Batch
from involution.checks import strict_json
from involution.engine.config import EvalConfig
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.evaluate import _warn_once_if_slow, autocast, evaluate
from involution.engine.load import evaluate_each
from involution.engine.tasks.classification import Accuracy
from involution.weights.run_file import read, write

DATA = {
    "train_size": 32, "val_size": 32, "val_resize": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "loader": "torch",
    "decoder": "auto", "workers": 0, "exclude": None, "on_error": "stop",
}  # fmt: skip
EVAL = ["eval.py", "device=cpu", "batch_size=7"]


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Three classes."""
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


@pytest.fixture(scope="module")
def checkpoints(images, tmp_path_factory) -> list[Path]:
    """Two models of these classes."""
    folder, found = tmp_path_factory.mktemp("checkpoints"), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        options = {"name": "rednet26", "num_classes": 3, "kernel_size": 3}
        model = fitted(involution.create_model(**options), size=32)
        torch.nn.init.normal_(model.fc.weight)
        config = {"model": options, "data": {"name": "folder", "root": str(images), **DATA}}
        state = {"model": model.state_dict(), "ema": None, "config": config, "class_names": ["a", "b", "c"]}
        found.append(folder / f"{seed}.pt")
        write(found[-1], state)
    return found


def logits(checkpoint: Path, images: Path, **preparation: int) -> torch.Tensor:
    """(18, 3), the classes one after the other."""
    from PIL import Image

    loaded = involution.load(checkpoint, **preparation)
    pictures = [Image.open(images / "val" / name / f"{i}.jpg") for name in "abc" for i in range(6)]
    with torch.no_grad():
        return loaded.model(torch.stack([loaded.transform(each) for each in pictures]))


def test_several_checkpoints_at_another_size_make_a_table(checkpoints, images, tmp_path):
    both = f"checkpoint=[{checkpoints[0]},{checkpoints[1]}]"
    finished = in_process(*EVAL, both, "data.val_size=48", f"results={tmp_path}/results.csv")
    assert finished.status == 0, finished.stderr
    results = json.loads(finished.stdout.splitlines()[-1])["results"]
    targets = torch.arange(3).repeat_interleave(6)
    for checkpoint, found in zip(checkpoints, results, strict=True):
        expected = logits(checkpoint, images, val_size=48, val_resize=48)
        assert found["checkpoint"] == str(checkpoint)
        assert found["top1"] == pytest.approx((expected.argmax(1) == targets).float().mean().item() * 100)
        loss = torch.nn.functional.cross_entropy(expected, targets)
        assert found["loss"] == pytest.approx(loss.item(), rel=1e-3), "the resize followed the crop"
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["checkpoint"] for row in rows] == [str(each) for each in checkpoints]
    assert [float(row["loss"]) for row in rows] == [each["loss"] for each in results]
    two = EvalConfig(checkpoint=[str(checkpoints[0]), "gone.pt"], predictions=None, results=None)
    with pytest.raises(UserError, match=r"there is no file gone\.pt"):  # before the first one is evaluated
        next(evaluate_each(two, [], World(0, 1, torch.device("cpu"))))
    refused = in_process(*EVAL, both, f"predictions={tmp_path}/p.csv")
    assert (refused.status, "predictions= is of one checkpoint" in refused.stderr) == (2, True)


def test_a_part_of_the_classes_under_other_names(checkpoints, images, tmp_path):
    """As ImageNet-A and -R: a folder of classes alone, scored among them; one class stands for two of the model's."""
    part = tmp_path / "part"
    for name, other in (("a", "x"), ("c", "7")):
        part.mkdir(exist_ok=True)
        (part / other).symlink_to(images / "val" / name)
    (tmp_path / "map.txt").write_text("# folder class\nx a\n7,2\n")
    words = [f"checkpoint={checkpoints[0]}", "data=folder", f"data.root={part}"]
    finished = in_process(*EVAL, *words, f"class_map={tmp_path}/map.txt")
    assert finished.status == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    expected = logits(checkpoints[0], images)[[*range(6), *range(12, 18)]][:, [0, 2]]
    targets = torch.tensor([0] * 6 + [1] * 6)
    assert found["top1"] == pytest.approx((expected.argmax(1) == targets).float().mean().item() * 100)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(expected, targets).item(), rel=1e-3)
    assert (found["n"], found["labelled"]) == (12, 12)
    (part / "excluded.txt").write_text("x/0.jpg\n")
    fewer = in_process(*EVAL, *words, f"class_map={tmp_path}/map.txt")
    assert json.loads(fewer.stdout.splitlines()[-1])["n"] == 11, fewer.stderr
    for text, message in (
        ("x a", "lacks 1 of the data set's classes: 7"),
        ("x d\n7 b", "the model has no class d"),
        ("x 3\n7 b", "the model has no class 3"),
    ):
        (tmp_path / "map.txt").write_text(text)
        refused = in_process(*EVAL, *words, f"class_map={tmp_path}/map.txt")
        assert (refused.status, message in refused.stderr) == (2, True), refused.stderr


def test_any_number_of_labels_for_each_picture(checkpoints, images, tmp_path):
    """As ImageNet-ReaL; the pictures are found by the number in their names."""
    root = tmp_path / "data"
    (root / "train").mkdir(parents=True)
    (root / "train" / "a").symlink_to(images / "train" / "a")
    (root / "val" / "a").mkdir(parents=True)
    for i in range(6):
        (root / "val" / "a" / f"ILSVRC2012_val_0000000{i + 1}.jpg").symlink_to(images / "val" / "a" / f"{i}.jpg")
    labels = [[0], [1, 2], [], [0, 1, 2], [2], [1]]
    (tmp_path / "real.json").write_text(json.dumps(labels))
    words = [f"checkpoint={checkpoints[0]}", "data=folder", f"data.root={root}", f"class_map={tmp_path}/real.json"]
    finished = in_process(*EVAL, *words)
    assert finished.status == 0, finished.stderr
    found = json.loads(finished.stdout.splitlines()[-1])
    guesses = logits(checkpoints[0], images)[:6].argmax(1).tolist()
    hits = [guess in label for guess, label in zip(guesses, labels) if label]
    assert found["top1"] == pytest.approx(100 * sum(hits) / 5)
    assert (found["n"], found["labelled"], found["top5"]) == (6, 5, 100)
    (tmp_path / "real.json").write_text("[[0]]")
    refused = in_process(*EVAL, *words)
    assert (refused.status, "has 1 pictures" in refused.stderr) == (2, True), refused.stderr


def test_the_average_of_checkpoints_is_one(checkpoints, tmp_path):
    words = map(str, (tmp_path / "mean.pt", *checkpoints))
    finished = in_process("scripts/average_checkpoints.py", *words)
    assert finished.status == 0, finished.stderr
    loaded = involution.load(tmp_path / "mean.pt")
    assert loaded.class_names == ("a", "b", "c")
    one, other = (read(each)["model"] for each in checkpoints)
    for key, value in loaded.model.state_dict().items():
        expected = (one[key] + other[key]) / 2 if value.is_floating_point() else other[key]
        torch.testing.assert_close(value, expected)
    torch.save(involution.create_model("resnet26").state_dict(), tmp_path / "other.pth")
    refused = in_process(
        "scripts/average_checkpoints.py", str(tmp_path / "m.pt"), str(checkpoints[0]), str(tmp_path / "other.pth")
    )
    assert (refused.status, "of different models: " in refused.stderr) == (2, True)


def test_help_lists_groups_and_keys_with_their_comments():
    shown = in_process("train.py", "model=timm", "model.name=convnext_tiny", "--help")
    assert shown.status == 0
    assert "    timm                  Any model of the installed timm" in shown.stdout
    assert shown.stdout.splitlines()[1:3] == [
        "  python train.py recipe=demo",
        "  python train.py model=rednet50 data.root=/path/to/imagenet",
    ]
    groups = re.findall(r"^  (\w+)=", shown.stdout.partition("Keys, ")[0], re.MULTILINE)
    assert groups == ["recipe", "model", "data", "optimizer", "schedule", "augmentation", "ablation"]
    assert "    kernel_size           Table 6a: side length of the kernels\n" in shown.stdout
    assert "as_trained" not in shown.stdout
    lines = {line.split("=")[0].strip(): line for line in shown.stdout.partition("Keys, ")[2].splitlines()}
    assert lines["train.precision"].endswith("# fp32 | bf16 | fp16: autocast; fp16 scales the loss")
    assert "model.options=null" in lines["model.options"]
    assert lines["train.epochs"].split() == ["train.epochs=130"]
    assert "_target_" not in lines["optimizer.lr"]
    evaluation = in_process("eval.py", "-h").stdout
    assert "python eval.py checkpoint=runs/demo-rednet26\n" in evaluation
    assert "data=as_trained" in evaluation
    assert "class_map=null" in evaluation
    assert "a file, or a run's folder" in evaluation


def test_nobody_reads_what_is_printed():
    """As in `train.py --help | head -1`."""
    process = start([sys.executable, "train.py", "--help"])
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")


def test_a_type_that_the_cpu_is_slow_at_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    _warn_once_if_slow.cache_clear()
    for precision in ("fp32", "bf16", "fp16") * 2:
        autocast(torch.device("cpu"), precision)
    said = [record.message.split(" may")[0] for record in caplog.records]
    assert said == ["precision=bf16"] * (platform.machine() == "x86_64") + ["precision=fp16"]


def test_outputs_that_overflow_count_as_wrong_and_are_said(caplog):
    class Overflows(nn.Module):
        def forward(self, images):
            return images.flatten(1)

    images = torch.zeros(3, 2, 1, 1)
    images[0] = torch.nan
    images[1, 0] = torch.inf
    images[2, 0] = 1
    batch = Batch(images, torch.zeros(3, dtype=torch.long), 3)
    found = evaluate(Overflows(), [batch], Accuracy(), World(0, 1, torch.device("cpu")), samples=3)
    assert found["top1"] == pytest.approx(100 / 3)
    assert "the loss is not finite" in caplog.text
    assert json.loads(strict_json(found)) == found | {"loss": None}
