"""Segmentation trains, resumes, evaluates and predicts through the programs that classification has."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from programs import in_process, kill, start, torchrun
from reliability import outcome, saved_step, wait_until, write_masks
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from data.cityscapes import CITYSCAPES
from data.mask_list import IGNORED
from data.segmentation import SegmentationBatch
from involution.engine.distributed import World
from involution.engine.tasks.mean_iou import MeanIou, bands, logits_of
from involution.engine.tasks.segmentation import Segmentation
from involution.weights.run_file import read

ONE = World(0, 1, torch.device("cpu"))


class Fixed(torch.nn.Module):
    """Logits that are a function of the pixels, at a quarter of their resolution."""

    def forward(self, x):
        logits = F.avg_pool2d(x, 4, ceil_mode=True)
        return torch.cat([logits, -logits[:, :2]], 1)


@pytest.mark.parametrize("size", [(64, 96), (65, 97), (131, 50)])
def test_bands_are_the_enlarged_logits(size):
    logits = torch.randn(5, 17, 24)
    joined = torch.cat([band for _, band in bands(logits, *size)], 1)
    torch.testing.assert_close(joined, F.interpolate(logits[None], size, mode="bilinear")[0])


def test_scoring_takes_less_memory_than_the_logits():
    """Of a picture as high as Cityscapes'; how wide it is does not matter."""
    logits = torch.randn(1, 19, 256, 64)
    mask = torch.randint(0, 19, (1024, 256), dtype=torch.uint8)
    batch = SegmentationBatch([torch.zeros(1, 3, *mask.shape)], [mask], np.array([0]), 1)
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        MeanIou().add(lambda image: logits, batch)
    events = profiled.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    assert 0.25 * logits.nbytes < max(np.cumsum(changes)) < logits.nbytes


def samples(count):
    random = np.random.default_rng(0)
    for i in range(count):
        shape = (33 + 7 * i, 40 + 3 * i)
        mask = torch.from_numpy(random.integers(0, 4, shape).astype(np.uint8))
        mask[:2] = IGNORED
        yield torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(i)), mask


def score(order, evaluations):
    pairs = list(samples(5))
    for i, group in enumerate(order):
        images, masks = zip(*(pairs[k] for k in group))
        evaluations[i % len(evaluations)].add(
            Fixed(), SegmentationBatch([*images], [*masks], np.array(group), len(group))
        )


def test_mean_iou_is_that_of_all_pixels_in_any_batches_and_on_any_ranks():
    whole = MeanIou(["a", "b", "c", "d", "e"])
    score([[0, 1, 2, 3, 4]], [whole])
    result = whole.finish(ONE)
    truth, found, losses = [], [], []
    for image, mask in samples(5):
        logits = F.interpolate(Fixed()(image), mask.shape, mode="bilinear")
        counted = mask != IGNORED
        truth.append(mask[counted])
        found.append(logits[0].argmax(0)[counted])
        losses.append(F.cross_entropy(logits, mask[None].long(), ignore_index=IGNORED, reduction="sum"))
    truth, found = torch.cat(truth), torch.cat(found)
    iou = [100 * ((truth == c) & (found == c)).sum() / ((truth == c) | (found == c)).sum() for c in range(5)]
    assert result["n"] == 5
    assert list(result["iou"].values()) == pytest.approx([float(x) for x in iou])
    assert result["miou"] == pytest.approx(float(sum(iou)) / 5)
    assert result["loss"] == pytest.approx(float(sum(losses)) / len(truth), rel=1e-5)
    ranks = [MeanIou(), MeanIou()]
    score([[4], [2, 0], [3, 1]], ranks)
    assert torch.equal(ranks[0].counts + ranks[1].counts, whole.counts)


def test_a_class_that_is_nowhere_has_no_part_in_the_mean():
    evaluation = MeanIou([*"abcde"])
    image = torch.ones(1, 3, 8, 8)
    evaluation.add(Fixed(), SegmentationBatch([image], [torch.zeros(8, 8, dtype=torch.uint8)], np.array([0]), 1))
    result = evaluation.finish(ONE)
    assert result["miou"] == 100
    assert result["iou"] == {"a": 100, "b": None, "c": None, "d": None, "e": None}


def test_windows_cover_a_picture_and_give_their_mean():
    image = torch.randn(1, 3, 40, 52)
    windows = []  # NaN but for the window
    for top in (0, 10, 20, 24):
        for left in (0, 16, 28):
            logits = torch.full((5, 40, 52), torch.nan)
            place = (..., slice(top, top + 16), slice(left, left + 24))
            logits[place] = F.interpolate(Fixed()(image[place]), (16, 24), mode="bilinear")[0]
            windows.append(logits)
    torch.testing.assert_close(logits_of(Fixed(), image, (16, 24)), torch.stack(windows).nanmean(0))
    assert torch.equal(logits_of(Fixed(), image, (64, 64)), logits_of(Fixed(), image, None))


def test_the_loss_is_a_mean_over_pixels_summed_over_the_samples_that_count():
    logits = {"out": torch.randn(3, 4, 4, 6, requires_grad=True), "aux": torch.randn(3, 4, 2, 3)}
    masks = torch.randint(0, 4, (3, 16, 24), dtype=torch.uint8)
    masks[0, :8] = IGNORED
    task = Segmentation(("out", "aux"))
    for valid in (3, 2, 0):
        losses = task.loss(lambda images: logits, SegmentationBatch(masks, masks, np.arange(3), valid))
        for name, weight in (("out", 1), ("aux", 0.4)):
            maps = F.cross_entropy(
                F.interpolate(logits[name], (16, 24), mode="bilinear"),
                masks.long(),
                ignore_index=IGNORED,
                reduction="none",
            )
            expected = weight * maps[:valid].mean((1, 2)).sum()
            torch.testing.assert_close(losses[f"loss_{name}"], expected, rtol=1e-5, atol=1e-6)
    losses["loss_out"].backward()
    assert not logits["out"].grad.any()


TINY = [
    "recipe=demo_segmentation", "device=cpu", "train.global_batch_size=4", "train.batch_size=2", "deterministic=true",
    "data.train_size=[32,48]", "train.steps=6", "train.evaluate_every_steps=6", "train.log_every_steps=1",
    "train.checkpoint_every_steps=2", "optimizer=sgd",
]  # fmt: skip


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    """Twelve frames of squares on noise, in Cityscapes' layout and with its label ids."""
    root, random = tmp_path_factory.mktemp("city"), np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 3)):
        for i in range(count):
            values = np.full((48, 64), 7, np.uint8)
            values[10:30, 5 * i : 5 * i + 20] = 26
            values[40:] = 3  # counts for nothing
            picture = random.integers(0, 60, (48, 64, 3)) + 120 * (values == 26)[..., None]
            for kind, pixels in (("leftImg8bit", picture), ("gtFine", values)):
                path = root / kind / split / "a" / f"a_{i}_0_{kind}{'_labelIds' * (kind == 'gtFine')}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def words(folder, city, *overrides):
    return [*TINY, "data=cityscapes", f"data.root={city}", f"output_root={folder}", "name=run", *overrides]


def train_here(*arguments):
    finished = in_process("train.py", *arguments, "data.workers=0")
    assert finished.status == 0, finished.stderr
    return finished


@pytest.fixture(scope="module")
def run(city, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    finished = train_here(*words(folder, city))
    assert set(finished.result) == {"run_dir", "epochs", "steps", "val_miou", "best_miou"}
    return folder / "run"


@pytest.mark.slow
def test_a_run_records_its_task_and_a_killed_one_ends_bit_equal(run, city, tmp_path):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[-1]["val_miou"] > 0
    assert lines[0]["val_miou"] is None
    assert lines[-1]["val_loss"] > 0
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert b"overlays/" in events
    process = start([sys.executable, "train.py", *words(tmp_path, city)])
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, process)
    kill(process)
    assert "going on from" in train_here(*words(tmp_path, city)).stderr
    assert outcome(tmp_path / "run") == outcome(run)


@pytest.mark.parametrize(
    ("model", "neck", "parts"),
    [
        ("semantic_fpn", "convolution", []),
        ("upernet", "convolution", ["train_loss_out", "train_loss_aux"]),
        ("upernet", "involution", ["train_loss_out", "train_loss_aux"]),
    ],
)
def test_each_segmentor_trains_with_each_neck(city, tmp_path, model, neck, parts):
    """Semantic FPN with involutions is `run`."""
    options = [f"model={model}", f"model.neck={neck}", "train.steps=2", "optimizer.momentum=0"]
    result = train_here(*words(tmp_path, city, *options)).result
    line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (result["steps"], result["val_miou"]) == (2, line["val_miou"])
    assert line["val_miou"] > 0
    assert [key for key in line if key.startswith("train_loss_")] == parts
    if parts:
        assert line["train_loss"] == pytest.approx(sum(line[part] for part in parts))
    shutil.rmtree(tmp_path / "run")  # UPerNet's is half a gigabyte


def test_fine_tuning_keeps_what_is_frozen_and_a_classifier_for_the_same_classes(run, city, tmp_path):
    before = read(run / "checkpoints" / "best.pt")["model"]
    street = write_masks(tmp_path / "street")
    folder = ["data=segmentation_folder", f"data.root={street}", "data.classes=[ground,digit]"]
    for name, data, said in (
        ("same", [], "the classifier for 19 classes is kept (road, sidewalk"),
        ("other", folder, "the weights have no classifier for 2 classes: it starts afresh"),
    ):
        options = [f"checkpoint={run}", "model.backbone.freeze=1", "optimizer.lr=1e-4", "train.steps=1", f"name={name}"]
        assert said in train_here(*words(tmp_path, city, *options, *data)).stderr
        after = read(tmp_path / name / "checkpoints" / "last.pt")["model"]
        kept = {key for key in before if torch.equal(after[key], before[key])}
        assert kept >= {key for key in before if key.startswith(("backbone.stem.", "backbone.layer1."))}
        assert not kept & {f"backbone.layer2.0.{key}" for key in ("conv1.weight", "bn1.running_mean")}
        for key, value in after.items():
            if key.startswith("head.classify.") and name == "other":
                assert len(value) == 2
            elif "running" not in key and "num_batches" not in key:
                torch.testing.assert_close(value, before[key], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_ranks_and_one_process_agree_on_the_score_and_write_the_benchmarks_labels(run, city, tmp_path):
    """Complaint 5, segmentation."""
    recorded = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    finished = torchrun(
        3, "eval.py", f"checkpoint={run}", f"predictions={tmp_path}/labels", "device=cpu", "batch_size=2"
    )
    assert finished.status == 0, finished.stderr
    result = finished.result
    assert set(result) == {"checkpoint", "miou", "loss", "n", "iou"}
    assert (result["miou"], result["n"]) == (recorded["val_miou"], 3)
    assert set(result["iou"]) == set(CITYSCAPES.names)
    files = sorted(path.name for path in (tmp_path / "labels").iterdir())
    assert files == ["a_0_0.png", "a_1_0.png", "a_2_0.png"]
    values = np.asarray(Image.open(tmp_path / "labels" / "a_1_0.png"))
    assert values.shape == (48, 64)
    assert set(np.unique(values)) <= set(CITYSCAPES.values.tolist())
    sheet, table = tmp_path / "sheet.png", tmp_path / "table.csv"
    finished = in_process(
        "eval.py", f"checkpoint={run}", f"images={city}/leftImg8bit/val", f"contact_sheet={sheet}", f"output={table}",
        f"predictions={tmp_path}/mine", "device=cpu",
    )  # fmt: skip
    assert finished.status == 0, finished.stderr
    shares = json.loads(finished.stdout.splitlines()[-1])["predictions"][1]["classes"]
    same = np.asarray(Image.open(tmp_path / "mine" / "a_1_0_leftImg8bit.png"))
    assert (same == values).all()
    assert sum(shares.values()) == pytest.approx(100, abs=0.01)
    assert Image.open(sheet).width > 500
    assert table.read_text().startswith("image,class,percent\n")
    refused = in_process("eval.py", f"checkpoint={run}", "data=imagenet", f"data.root={city}", "device=cpu")
    assert refused.status == 2
    assert "model=semantic_fpn does not go with data=imagenet" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["model=semantic_fpn", "data=imagenet"], "model=semantic_fpn does not go with data=imagenet"),
        (["model=rednet26", "data=cityscapes"], "model=rednet26 does not go with data=cityscapes"),
        (["model=semantic_fpn", "data=cityscapes"], "choose recipe=cityscapes"),
        (["recipe=cityscapes", "train.epochs=3"], "set the other to null"),
        # complaint 15
        (["recipe=cityscapes", "model=upernet", "train.batch_size=1"], "use train.batch_size=2 or more"),
        (["recipe=cityscapes", "train.freeze=1"], "model.backbone.freeze"),
        (["recipe=cityscapes", "data.root=/nowhere"], "is no Cityscapes"),
        (["recipe=cityscapes", "data.root=PALETTE"], "has a palette; it should have one channel"),
        (["recipe=cityscapes", "data=segmentation_folder"], "set data.root"),
        (["recipe=cityscapes", "data.window=7"], "data.window=7 should be [height,width]"),
    ],
)
def test_wrong_input_ends_with_one_message_and_status_2(city, tmp_path, arguments, message):
    if "data.root=PALETTE" in arguments:
        root = shutil.copytree(city, tmp_path / "city")
        mask = next(root.glob("gtFine/val/a/*.png"))
        Image.open(mask).convert("P").save(mask)
        arguments = [*arguments[:-1], f"data.root={root}"]
    finished = in_process("train.py", f"output_root={tmp_path / 'runs'}", "device=cpu", *arguments)
    assert finished.status == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list((tmp_path / "runs").glob("*"))


def test_a_value_that_is_no_label_stops_a_run_and_names_its_file(city, tmp_path):
    root = shutil.copytree(city, tmp_path / "city")
    mask = root / "gtFine" / "train" / "a" / "a_4_0_gtFine_labelIds.png"
    Image.fromarray(np.full((48, 64), 77, np.uint8)).save(mask)
    finished = in_process("train.py", *words(tmp_path, root), "data.workers=0")
    assert finished.status == 2, finished.stderr
    assert f"mask {str(mask)!r} has the value 77" in finished.stderr
    assert "Traceback" not in finished.stderr
