"""The picture of a run's curves, from lines as train.py writes them."""

import json

from programs import python


def test_it_draws_runs_and_refuses_other_folders(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    lines = [{"epoch": n, "train_loss": 2.0 / n, "val_top1": None if n == 1 else 10.0 * n} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    finished = python("scripts/plot_curves.py", str(run), "--out", str(tmp_path / "curves.png"))
    assert finished.stderr == ""
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished.status, finished.stdout) == (0, f"{tmp_path / 'curves.png'}\n")
    refused = python("scripts/plot_curves.py", str(tmp_path))
    assert refused.status == 2
    assert "holds no finished epoch" in refused.stderr
