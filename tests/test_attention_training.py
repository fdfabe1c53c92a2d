"""The self-attention families through the real train.py: training, resuming after a kill, what is refused."""

import re
from pathlib import Path

import pytest
from programs import in_process
from reliability import command, lines, outcome, train_here, write_images

FEW = ["train.global_batch_size=4", "train.checkpoint_every_steps=1", "data.loader=torch"]
LARGE = ["data.train_size=128", "data.val_size=128", "data.val_resize=128"]  # the least that SAN takes


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "blobs", val=3)


def train(run: Path, images: Path, *overrides: str) -> None:
    ended = train_here(run, images, *overrides)
    assert ended.status == 0, ended.stderr


FAMILIES = {  # and what its pictures have to be
    "standalone_resnet26": [],
    "lrnet26": [],
    "san10_pairwise": LARGE,
    "san10_patchwise": LARGE,
    "aa_resnet50": ["model.image_size=32"],
    "axial_resnet26s": ["model.image_size=32"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_goes_on_from_what_a_kill_leaves(name: str, images: Path, tmp_path: Path) -> None:
    """After kill -9 in the second step there is the first one's checkpoint, and nothing that is written at the end."""
    run = tmp_path / "run"
    overrides = [f"model={name}", "train.max_steps=2", *FEW, *FAMILIES[name]]
    train(run, images, *overrides)
    untouched = outcome(run)
    for file in ("checkpoints/step-00000002.pt", "checkpoints/last.pt", "checkpoints/best.pt", "metrics.jsonl"):
        (run / file).unlink()
    (run / "summary.json").unlink()
    (run / "checkpoints" / "last.pt").symlink_to("step-00000001.pt")
    train(run, images, *overrides)
    assert "going on from" in (run / "train.log").read_text()
    assert [line["step"] for line in lines(run)] == [2]
    assert outcome(run) == untouched


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("san10_patchwise", ["data.val_size=64"], "features of 2 x 2 pixels .* at least 128"),
        ("san10_patchwise", [*LARGE, "data.train_size=96"], "features of 3 x 3 pixels .* at least 128"),
        ("standalone_resnet26", ["model.heads=3"], "heads is 3; it should divide the layer's 64 channels"),
        ("lrnet26", ["model.group_channels=16"], "group_channels is 16; it should divide the layer's 104 channels"),
        ("axial_resnet26s", ["model.image_size=16"], "attention along 8 pixels; the position tables reach 4"),
        ("axial_resnet_s", ["model.span=14"], "span is 14; it should be odd"),
        ("aa_resnet50", ["model.image_size=0"], "image_size is 0"),
        ("san10_pairwise", ["model.kernel_size=3"], "kernel_size"),
    ],
)
def test_what_cannot_be_is_refused_with_one_message(
    name: str, overrides: list[str], message: str, images: Path, tmp_path: Path
) -> None:
    arguments = command(tmp_path / "run", images, f"model={name}", *FEW, *overrides)[2:]
    ended = in_process("train.py", *arguments)
    assert ended.status == 2, ended.stderr
    (error,) = [line for line in ended.stderr.splitlines() if line.startswith("train.py: ")]
    assert re.search(message, error)
    assert "Traceback" not in ended.stderr
