"""The picture of a run's curves, from lines as train.py writes them."""

import json

from programs import in_process


def test_it_draws_runs_and_refuses_other_folders(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    lines = [{"epoch": n, "train_loss": 2.0 / n, "val_top1": None if n == 1 else 10.0 * n} for n in (1, 2, 3)]
    (run / "config.yaml").write_text("{model: {name: rednet26}, data: {}, train: {}}")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"torn')
    finished = in_process("scripts/plot_curves.py", str(run), "--out", str(tmp_path / "curves.png"))
    assert finished.stderr == ""
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (finished.status, finished.stdout) == (0, f"{tmp_path / 'curves.png'}\n")
    (run / "metrics.jsonl").unlink()
    (tmp_path / "empty").mkdir()
    for folder, message in (("a", "none of these runs has finished an epoch"), ("empty", "holds no runs")):
        refused = in_process("scripts/plot_curves.py", str(tmp_path / folder))
        assert refused.status == 2
        assert message in refused.stderr
