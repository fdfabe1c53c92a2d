"""The recipes of classifiers: killed and resumed to the bit, moved to another number of ranks."""

import socket
from pathlib import Path

import pytest
import torch
from forked import Forked
from reliability import command, lines, outcome, saved_step, write_images

from involution.weights.run_file import read

SHORT = [
    "train.max_steps=3", "train.checkpoint_every_steps=1", "train.keep_checkpoints=9", "data.workers=0",
    "data.loader=torch",
]  # fmt: skip
RECIPES = {
    "released": [],
    "rsb_a1": [
        "optimizer.lr=0.002",
        "train.layer_decay=0.9",
        "augmentation.erasing=0.5",
        "augmentation.color_jitter=0.4",
    ],
    "swin": [],
}  # `paper`: test_resume.py; rsb_a2 and rsb_a3 are rsb_a1 with other values


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


def start(run: Path, images: Path, recipe: str, *words: str, **environment: str) -> Forked:
    _, program, *arguments = command(run, images, f"recipe={recipe}", *SHORT, *RECIPES[recipe], *words)
    return Forked(run.parent / f"log{environment.get('RANK', '')}", program, *arguments, **environment)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_and_resumed_bit_equal_and_the_same_pictures_on_two_ranks(recipe, images, tmp_path):
    # dropped branches are drawn by each rank: exact on as many ranks, tested in test_timm_models.py
    words = ["model.drop_path_rate=0"] if recipe != "released" else []
    untouched, killed, moved = (tmp_path / name / "run" for name in ("untouched", "killed", "moved"))
    for run in (untouched, killed, moved):
        run.parent.mkdir()
    assert start(untouched, images, recipe, *words).finish() == 0, (untouched.parent / "log").read_text()

    start(killed, images, recipe, *words).kill_when(lambda: saved_step(killed) >= 1)
    assert saved_step(killed) < 3
    assert start(killed, images, recipe, *words).finish() == 0, (killed.parent / "log").read_text()
    assert "going on from" in (killed.parent / "log").read_text()
    assert outcome(killed) == outcome(untouched)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    words.append(f"train.resume={untouched / 'checkpoints' / 'step-00000002.pt'}")
    ranks = [start(moved, images, recipe, *words, RANK=str(r), LOCAL_RANK=str(r), **shared) for r in range(2)]
    assert [rank.finish() for rank in ranks] == [0, 0], (moved.parent / "log0").read_text()
    assert lines(moved)[-1]["train_loss"] == pytest.approx(lines(untouched)[-1]["train_loss"], rel=1e-4)
    found, wanted = (read(run / "checkpoints" / "last.pt")["model"] for run in (moved, untouched))
    own = ("running_mean", "running_var", "num_batches_tracked")  # of the batches that rank 0 saw itself
    for key in wanted:
        if not key.endswith(own):
            torch.testing.assert_close(found[key], wanted[key], rtol=1e-3, atol=1e-4)
