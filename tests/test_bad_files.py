"""A file that is no image: the run stops and names it, leaves it out on request, or never sees it after a scan."""

import pytest
from programs import in_process
from reliability import train, train_here, write_images

SHORT = ["train.max_steps=3", "train.ema_decay=null"]


@pytest.fixture
def images(tmp_path):
    root = write_images(tmp_path / "images")
    for split in ("train", "val"):
        broken = root / split / "b" / "1.jpg"
        broken.write_bytes(broken.read_bytes()[:60])
    return root


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_a_bad_file_stops_the_run_which_names_it(tmp_path, images, loader):
    if loader == "dali":
        pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    finished = train_here(tmp_path / "run", images, *SHORT, f"data.loader={loader}")
    assert finished.status == 2
    assert str(images / "train" / "b" / "1.jpg") in finished.stderr
    assert "check_dataset.py" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_skip_leaves_it_out_of_training_and_of_an_exact_evaluation(tmp_path, images):
    overrides = [*SHORT, "data.on_error=skip"]
    one, two = train_here(tmp_path / "one", images, *overrides), train(tmp_path / "two", images, *overrides, ranks=2)
    for finished in (one, two):
        assert finished.status == 0, finished.stderr
        assert "1 of 18 files do not decode" in finished.stderr
    checkpoint = f"checkpoint={tmp_path}/one"
    assert in_process("eval.py", checkpoint, "device=cpu").result["n"] == 17
    assert in_process("eval.py", checkpoint, "device=cpu", "data.on_error=stop").status == 2


def test_after_a_scan_the_bad_files_are_excluded(tmp_path, images):
    (images / "excluded.txt").write_text("train/a/0.jpg\n")
    scan = in_process("scripts/check_dataset.py", str(images))
    assert scan.status == 1
    assert (images / "excluded.txt.before").read_text() == "train/a/0.jpg\n"
    assert len([line for line in (images / "excluded.txt").read_text().splitlines() if line[0] != "#"]) == 2
    finished = train_here(tmp_path / "run", images, *SHORT)
    assert finished.status == 0, finished.stderr
    assert in_process("eval.py", f"checkpoint={tmp_path}/run", "device=cpu").result["n"] == 17
