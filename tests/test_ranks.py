"""Two ranks of the real train.py, started as srun does, so that nothing but they themselves ends one for the other."""

import os
import re
import shutil
import signal
import time

import pytest
from programs import ROOT, finish, kill, start
from reliability import command, saved_step, start_ranks, train, wait_until, write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "blobs")


def both(words, *of_rank_1):
    """The exit statuses and standard errors of two ranks, of which rank 1 has other arguments besides."""
    began = time.monotonic()
    ended = [finish(rank) for rank in start_ranks([words, [*words, *of_rank_1]])]
    return [each.status for each in ended], "\n".join(each.stderr for each in ended), time.monotonic() - began


def test_another_configuration_is_refused_naming_the_rank_and_the_key(images, tmp_path):
    statuses, errors, _ = both(command(tmp_path / "run", images), "optimizer.lr=0.03")
    assert statuses == [2, 2], errors
    assert "rank 1 has another configuration than rank 0: optimizer.lr is 0.02 on rank 0, 0.03 on rank 1" in errors
    assert not list((tmp_path / "run").glob("*"))


def test_another_data_set_is_refused_naming_the_rank(images, tmp_path):
    """The same path holds other files on rank 1's node: here a link that each rank resolves for itself."""
    other = tmp_path / "other"
    shutil.copytree(images, other)
    next((other / "train" / "a").iterdir()).unlink()
    words = command(tmp_path / "run", "${oc.env:IMAGES}")
    ranks = start_ranks([["env", f"IMAGES={folder}", *words] for folder in (images, other)])
    ended = [finish(rank) for rank in ranks]
    errors = "\n".join(each.stderr for each in ended)
    assert [each.status for each in ended] == [2, 2], errors
    assert "rank 1 has another" in errors
    assert "rank 0" in errors


def test_other_code_is_refused_naming_the_rank(images, tmp_path):
    for name in ("involution", "data", "conf"):
        shutil.copytree(ROOT / name, tmp_path / "copy" / name)
    shutil.copy(ROOT / "train.py", tmp_path / "copy")
    with open(tmp_path / "copy" / "involution" / "layers.py", "a") as source:
        source.write("# changed\n")
    words = command(tmp_path / "run", images)
    program = words.index("train.py")
    elsewhere = [*words[:program], str(tmp_path / "copy" / "train.py"), *words[program + 1 :]]
    ended = [finish(rank) for rank in start_ranks([words, elsewhere])]
    errors = "\n".join(each.stderr for each in ended)
    assert [each.status for each in ended] == [2, 2], errors
    assert "rank 1 has another code version than rank 0: sources is" in errors


def test_an_error_of_one_rank_ends_the_others_with_its_status(images, tmp_path):
    """Rank 1 cannot read the checkpoint that rank 0 can: a folder that is not shared between the nodes."""
    done = train(tmp_path / "run", images, "train.max_steps=1")
    assert done.status == 0, done.stderr
    shutil.copytree(images, tmp_path / "images")
    words = command(tmp_path / "run", images, "train.resume=${oc.env:STATE}", "train.max_steps=2")
    states = (tmp_path / "run" / "checkpoints" / "last.pt", tmp_path / "absent.pt")
    began = time.monotonic()
    ended = [finish(rank) for rank in start_ranks([["env", f"STATE={path}", *words] for path in states])]
    errors = "\n".join(each.stderr for each in ended)
    assert [each.status for each in ended] == [2, 2], errors
    assert "absent.pt" in errors
    assert time.monotonic() - began < 300  # and not the ten minutes of a collective


def test_a_killed_rank_takes_the_other_down(images, tmp_path):
    words = command(tmp_path / "run", images, "train.epochs=1000")
    ranks = start_ranks([words, words])
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, ranks[0])
    kill(ranks[1])
    finished = finish(ranks[0], timeout=60)
    assert finished.status == 1, finished.stderr


def test_a_rank_that_keeps_the_others_waiting_is_named(images, tmp_path):
    words = command(tmp_path / "run", images, "train.epochs=1000", "train.timeout_minutes=0.3")
    ranks = start_ranks([words, words])
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, ranks[0])
    os.kill(ranks[1].pid, signal.SIGSTOP)
    try:
        finished = finish(ranks[0], timeout=120)
        assert finished.status == 1, finished.stderr
        assert re.search(r"no progress for 18 s .*rank 1 on \S+ no longer reports", finished.stderr), finished.stderr
    finally:
        kill(ranks[1])


def test_a_second_run_in_the_folder_is_refused_and_a_dead_ones_lock_is_not_in_the_way(images, tmp_path):
    words = command(tmp_path / "run", images, "train.epochs=1000", "data.loader=torch")
    first = start(words)
    wait_until(lambda: saved_step(tmp_path / "run") >= 2, first)
    second = finish(start(words))
    assert second.status == 2
    assert re.search(rf"another run is writing to {tmp_path}/run: host \S+, pid {first.pid}\b", second.stderr)
    first.kill()  # this process alone: its loader's worker lives on for a while
    first.communicate()
    end = f"train.max_steps={saved_step(tmp_path / 'run') + 2}"
    third = train(tmp_path / "run", images, "train.epochs=1000", "data.loader=torch", end)
    assert third.status == 0, third.stderr
