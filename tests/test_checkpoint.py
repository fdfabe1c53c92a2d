"""Checkpoints survive damage, malice and full disks."""

import os
import pickle
import random
import threading

import pytest
import torch

from involution.engine import checkpoint
from involution.engine.checkpoint import CheckpointFolder, load_weights
from involution.engine.distributed import World
from involution.engine.errors import UserError
from involution.engine.resume import state_to_resume
from involution.engine.run import RunFolder
from involution.weights.run_file import DamagedCheckpoint, digest, read, write


def state(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    weights = {"w": torch.randn(64, 64, generator=generator), "b": torch.zeros(3, dtype=torch.bfloat16)}
    return {"model": weights, "step": step, "best": None, "config": {"lr": 0.1, "sizes": [1, 2]}}


def test_round_trip(tmp_path):
    write(tmp_path / "a.pt", state(1))
    loaded = read(tmp_path / "a.pt")
    assert digest(loaded) == digest(state(1))
    torch.testing.assert_close(loaded["model"], state(1)["model"], rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "a.pt"]


@pytest.mark.parametrize("seed", range(30))
def test_a_flipped_bit_is_found_or_harmless(tmp_path, seed):
    path = tmp_path / "a.pt"
    write(path, state(1))
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 1 << seed % 8
    path.write_bytes(content)
    try:
        loaded = read(path)  # the bit was in padding that nothing reads
    except DamagedCheckpoint as error:
        assert str(path) in str(error)
    else:
        assert digest(loaded) == digest(state(1))


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_truncated_file_is_reported_and_the_one_before_it_used(tmp_path, size, caplog):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        folder.save(state(step), step)
    folder.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pt", "step-00000002.pt", "step-00000003.pt"]
    os.truncate(tmp_path / "last.pt", size if size >= 0 else (tmp_path / "last.pt").stat().st_size - 1)
    with caplog.at_level("WARNING", logger="involution"):
        assert folder.newest()[1]["step"] == 2
    assert "last.pt" in caplog.text


def test_a_score_from_another_folder_has_a_best_checkpoint_here(tmp_path):
    """As with train.resume=PATH name=new."""
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    folder.wait()
    assert not (tmp_path / "best.pt").exists()
    folder.save(state(2) | {"best": 50.0}, 2)
    folder.save(state(3) | {"best": 50.0}, 3)
    folder.wait()
    assert read(tmp_path / "best.pt")["step"] == 2


@pytest.mark.parametrize(
    ("resume", "own", "origin", "restarts", "step"),
    [
        ("auto", "auto", None, 0, 2), ("never", "never", None, 0, None), ("never", "never", None, 1, 2),
        ("other.pt", "auto", None, 0, 1), ("other.pt", "auto", "/another.pt", 0, 1),
        ("other.pt", "other.pt", "other.pt", 0, 2), ("other.pt", "other.pt", "other.pt", 1, 2),
        ("./other.pt", "auto", "other.pt", 0, 2),  # it went on once without being told
        ("other.pt", "other.pt", "earlier code", 0, 2), ("other.pt", "auto", "earlier code", 0, 1),
    ],
)  # fmt: skip
def test_where_a_run_begins(tmp_path, monkeypatch, resume, own, origin, restarts, step):
    """`resume` now, and as the run's own checkpoint was written; `origin` is what that one once began from."""
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.pt", state(1))
    world = World(0, 1, torch.device("cpu"))
    run = RunFolder(tmp_path / "run", world)
    folder = CheckpointFolder(run.checkpoints)
    began = {} if origin == "earlier code" else {"origin": origin and os.path.abspath(origin)}
    folder.save(state(2) | {"config": {"train": {"resume": own}}} | began, 2)
    folder.wait()
    found = state_to_resume(resume, run, world)
    assert (found and found["step"]) == step
    assert run.checkpoints.exists() == (step is not None)


def test_tuples_stay_tuples(tmp_path):
    """As random.getstate() has them, which some optimizers keep."""
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1) | {"random": random.getstate()}, 1)
    folder.wait()
    random.setstate(read(tmp_path / "last.pt")["random"])


def test_all_damaged_is_an_error_and_none_is_a_fresh_start(tmp_path):
    folder = CheckpointFolder(tmp_path)
    assert folder.newest() is None
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"train\.resume=never"):
        folder.newest()


def test_a_malicious_pickle_does_not_run(tmp_path):
    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    torch.save({"model": Attack(), "sha256": ""}, tmp_path / "a.pt")
    (tmp_path / "b.pt").write_bytes(pickle.dumps(Attack()))
    for name in ("a.pt", "b.pt"):
        with pytest.raises(DamagedCheckpoint):
            read(tmp_path / name)
    assert not (tmp_path / "owned").exists()


def test_best_stays_when_its_step_is_no_longer_kept(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=1)
    for step in (1, 2, 3):
        folder.save(state(step), step, best=step == 1)
    folder.wait()
    assert read(tmp_path / "best.pt")["step"] == 1
    assert read(tmp_path / "last.pt")["step"] == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["best.pt", "last.pt", "step-00000003.pt"]


def test_saving_again_at_the_same_step(tmp_path):
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    folder.save(state(1) | {"best": 2.0}, 1, best=True)
    folder.wait()
    assert read(tmp_path / "last.pt")["best"] == 2.0


def test_what_training_does_after_save_does_not_reach_the_file(tmp_path):
    folder, mutable = CheckpointFolder(tmp_path), state(1)
    folder.save(mutable, 1)
    mutable["model"]["w"].zero_()
    folder.wait()
    assert digest(read(tmp_path / "last.pt")) == digest(state(1))


def test_the_writing_thread_ends_with_the_file(tmp_path, monkeypatch):
    """One that stays keeps an OpenMP team of its own, and libgomp then lets those of training sleep."""
    writers = []

    def note(*arguments):
        writers.append(threading.current_thread())
        write(*arguments)

    monkeypatch.setattr(checkpoint, "write", note)
    folder = CheckpointFolder(tmp_path)
    folder.save(state(1), 1)
    folder.wait()
    (writer,) = writers
    assert writer is not threading.current_thread()
    writer.join(10)
    assert not writer.is_alive()
    assert read(tmp_path / "last.pt")["step"] == 1


def test_weights_of_another_model_name_the_keys():
    model = torch.nn.Linear(3, 4)
    with pytest.raises(UserError, match=r"missing: bias; unexpected: c; of another shape: weight \(1,\)"):
        load_weights(model, {"weight": torch.zeros(1), "c": torch.zeros(1)})
