"""What scripts/gpu_session.sh runs, as far as a CPU allows, and the page that is made of it."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from programs import ROOT, in_process
from test_config import config

from involution.weights import run_file
from scripts.gpu import checks, page

GPU = "NVIDIA H100 80GB HBM3"
SMALL = ["--device", "cpu", "--precision", "fp32", "--models", "resnet26", "rednet26", "--size", "32", "--repeats", "4"]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the session leaves it, of checks that really ran, on the CPU."""
    out = tmp_path_factory.mktemp("session")
    for i in range(4):
        folder = out / "photos/train" / f"class {i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (60 * i, 0, 90)).save(folder / f"{i}.jpg")
    (out / "photos/val").symlink_to(out / "photos/train")
    for name, value in (("whole", 1), ("resumed", 1), ("other", 2)):
        (out / name / "checkpoints").mkdir(parents=True)
        run_file.write(out / name / "checkpoints/last.pt", {"model": {"weight": torch.tensor([value])}, "step": 20})
    photos = ["--root", str(out / "photos"), "--batch", "2", "4", "--workers", "1"]
    ghost = ["--batch", "4", "--batchnorm-size", "2", "--out", str(out / "step-ghost.json")]
    assert checks.main(["step", *SMALL, *ghost]) == 0
    step = ["--precision", "bf16", "--models", "rednet50", "--batch", "8", "16", "32", "--repeats", "1"]
    runs = ["--runs", str(out / "whole"), str(out / "resumed")]
    two = ["--batch", "2"]
    for name, more in (("machine", []), ("step", step), ("profile", two), ("loader", photos), ("same-bits", runs)):
        assert checks.main([name, "--out", str(out / f"{name}.json"), *SMALL, *more]) == 0
    machine = json.loads((out / "machine.json").read_text())
    (out / "machine.json").write_text(json.dumps(machine | {"GPU": GPU}))
    (out / "synchronisations.json").write_text('{"places": ["meter.py:39"]}')
    (out / "tests.txt").write_text("..s\nSKIPPED [1] a.py:3: 2 failed before\n2 passed, 1 skipped in 9.12s\n")
    lines = ("step\t124\t240\told\tpython a", "step\t0\t31\tabc1234\tpython a", "tests\t1\t9\told\tpytest")
    (out / "steps.tsv").write_text("".join(f"{line}\n" for line in lines))
    return out


@pytest.fixture(scope="module")
def report(session: Path) -> Path:
    """Its page's JSON."""
    assert page.main([str(session), "--out", str(session / "gpu")]) == 0
    return session / "gpu.json"


def test_the_page_says_what_was_measured(session: Path, report: Path) -> None:
    text = report.with_suffix(".md").read_text()
    for row in json.loads((session / "step.json").read_text())["rows"]:
        assert row["step (ms)"] >= row["host (ms)"] > 0
        assert row["images/s"] == pytest.approx(1000 * row["batch"] / row["step (ms)"])
    resnet, rednet = (row["images/s"] for row in json.loads((session / "step-ghost.json").read_text())["rows"])
    assert f"RedNet's speed in ResNet's: {rednet / resnet:.2f} at batch 4" in text
    assert f"RedNet is fastest at batch 4, {rednet:.0f} images/s" in text
    assert "train.batchnorm_size=2" in text
    assert "Tests on the GPU: 2 passed, 1 skipped in 9.12s." in text
    assert "waits for the GPU in meter.py:39" in text
    assert "stopped and resumed ends with the bits" in text
    assert "Pictures do not change" in text
    assert "data.decoder=cpu" in text
    assert "layer" in text or "conv" in text  # operators of the profile
    rows = json.loads(report.read_text())["tables"][-1]["rows"]
    assert [(row["step"], row["exit"], row["commit"]) for row in rows] == [("step", 0, "abc1234"), ("tests", 1, "old")]


@pytest.fixture
def cluster_table(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("cluster_table")


def test_the_predictions_for_many_gpus_are_what_their_script_makes(cluster_table: ModuleType) -> None:
    made = cluster_table.block(ROOT / "docs/benchmarks/gpu.json")
    assert made in (ROOT / "docs/cluster.md").read_text(), "python scripts/cluster_table.py writes them anew"


def test_they_take_the_speed_that_was_measured(cluster_table: ModuleType, session: Path, report: Path) -> None:
    speed = {row["batch"]: row["images/s"] for row in json.loads((session / "step.json").read_text())["rows"]}
    lines = cluster_table.block(report).splitlines()
    (r,) = (line for line in lines if line.startswith("| r, "))
    assert r.endswith(" | m |")
    assert f"{speed[32]:,.0f} at b = 32, {speed[16]:,.0f} at b = 16, {speed[8]:,.0f} at b = 8 images/s" in r
    assert f"{GPU}, commit abc1234" in r
    for setup, images, batch in (("16 x 32 x 4", 128, 32), ("128 x 16 x 1", 16, 16), ("256 x 8 x 1", 8, 8)):
        (cells,) = (line.split(" | ") for line in lines if f" = {setup} |" in line)
        assert float(cells[3]) == pytest.approx(1000 * images / speed[batch], rel=0.01)
    content = json.loads(report.read_text())
    for table in content["tables"]:
        if table.get("title", "").startswith("Training step"):
            del table["rows"][0]
    (session / "less.json").write_text(json.dumps(content))
    less = cluster_table.block(session / "less.json")
    assert "Not measured yet: b = 8." in less
    assert "= 256 x 8 x 1 |" not in less


def test_behind_a_captured_backward_nothing_of_the_all_reduce_hides(
    cluster_table: ModuleType, session: Path, report: Path
) -> None:
    content = json.loads(report.read_text())
    for table in content["tables"]:
        if table.get("title") == page.step_title("bf16"):
            table["title"] = page.step_title("bf16", cuda_graphs=True)
    steps = next(table["rows"] for table in content["tables"] if table.get("title") == "Steps")
    steps.append(steps[0] | {"step": "step-graphs", "commit": "fed4321"})
    (session / "graphs.json").write_text(json.dumps(content))
    lines = cluster_table.block(session / "graphs.json").splitlines()
    assert any("`train.cuda_graphs=true` (" in line and "commit fed4321" in line for line in lines)
    rows = [line.split(" | ") for line in lines if " x 32 x " in line]
    assert all(cells[4] == cells[5] for cells in rows)
    assert float(rows[0][4]) > 0


def test_the_results_of_two_gpus_do_not_mix(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))  # where there is no git
    assert checks.main(["machine", "--device", "cpu"]) == 0
    assert json.loads(capsys.readouterr().out)["commit"] == "unknown"
    assert checks.main(["machine", "--device", "cpu", "--out", str(session / "machine.json")]) == 2
    assert f"results of another GPU, {GPU}" in capsys.readouterr().err


def test_other_weights_are_not_the_same_bits(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main(["same-bits", "--runs", str(session / "whole"), str(session / "other")]) == 0
    assert json.loads(capsys.readouterr().out) == {"same": False, "different": ["weight"]}
    run_file.write(session / "other/checkpoints/last.pt", {"model": {}, "step": 10})
    assert checks.main(["same-bits", "--runs", str(session / "whole"), str(session / "other")]) == 2
    assert "after 20 and 10 steps" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_session_says_that_there_is_no_gpu(session: Path) -> None:
    run = subprocess.run(
        ["bash", "scripts/gpu_session.sh", str(session / "photos"), str(session / "out")],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert "GPU" in run.stderr
    assert "Traceback" not in run.stderr


def begin(session: Path, out: Path, bin: Path, case: str) -> subprocess.Popen[str]:
    """Start a session, from another folder, whose python writes down its words; `case` is of sh's case "$*" in."""
    bin.mkdir(exist_ok=True)
    (bin / "record").write_bytes(b"")
    lines = [
        "#!/bin/sh",
        f"printf '%s\\037' \"$@\" >> '{bin}/record'; echo >> '{bin}/record'",
        f'case "$*" in {case} esac',
    ]
    (bin / "python").write_text("\n".join(lines) + "\n")
    (bin / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"}
    words = ["bash", str(ROOT / "scripts/gpu_session.sh"), "--study", "photos", str(out)]
    return subprocess.Popen(
        words, cwd=session, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def started(bin: Path) -> list[list[str]]:
    """The words of every python of the session but those of a line."""
    commands = [line.split("\037")[:-1] for line in (bin / "record").read_text().splitlines()]
    return [words for words in commands if words[0] != "-c"]


def test_every_command_of_the_session_parses_and_what_failed_runs_again(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    benchmark = importlib.import_module("benchmark")
    first = begin(session, tmp_path / "out", tmp_path / "bin", '*"train.max_steps=10"*) exit 3;;')
    assert "left: half;" in first.communicate()[1]
    assert first.returncode == 1
    programs: dict[str, int] = {}
    for program, *words in started(tmp_path / "bin"):
        programs[program] = programs.get(program, 0) + 1
        if program == "train.py":
            assert config(*words).train.precision == "bf16"
            assert config(*words).data.root == str(session / "photos")
        elif program == "eval.py":
            assert config(*words, program="eval").precision == "bf16"
        elif program == "scripts/benchmark.py":
            monkeypatch.setattr(sys, "argv", [program, *words])
            assert benchmark.parse().device == "cuda"
        elif program == "scripts/gpu/checks.py":
            assert checks.parse(words).check == words[0]
    assert (programs["train.py"], programs["eval.py"], programs["scripts/benchmark.py"]) == (5, 2, 8)
    assert begin(session, tmp_path / "out", tmp_path / "bin", "").wait() == 0
    again = started(tmp_path / "bin")
    assert [words[1] for words in again if words[0] == "scripts/gpu/checks.py"] == ["machine", "same-bits"]
    trained = [words[-2:] for words in again if words[0] == "train.py"]
    assert trained == [["name=resumed", "train.max_steps=10"], ["name=resumed", "train.max_steps=20"]]


def test_a_signal_ends_the_step_and_the_session(session: Path, tmp_path: Path) -> None:
    case = """*name=first*) trap 'exit 75' TERM; echo > "$0.running"; sleep 60 & wait;;"""
    run = begin(session, tmp_path / "out", tmp_path / "bin", case)
    while not (tmp_path / "bin/python.running").exists():
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert "start again to go on" in run.communicate()[1]
    assert run.returncode == 75
    assert (tmp_path / "out/steps.tsv").read_text().splitlines()[-1].startswith("first\t75\t")
    assert not (tmp_path / "out/first.done").exists()
    assert "study" not in (tmp_path / "bin/record").read_text()


def test_the_page_finds_what_the_study_leaves(session: Path, tmp_path: Path) -> None:
    """Its own commands, of smaller runs."""
    out = tmp_path / "out"
    assert begin(session, out, tmp_path / "bin", "").wait() == 0
    train = {"model": "rednet26", "device": "cpu", "train.epochs": "2", "train.precision": "fp32"}
    train |= {"train.batch_size": "4", "train.global_batch_size": "4", "train.batchnorm_size": "2"}
    train |= {f"data.{key}": "32" for key in ("train_size", "val_size", "val_resize")} | {"data.workers": "1"}
    results = []
    for program, *words in started(tmp_path / "bin"):
        if "rednet50" in " ".join(words) and any("study" in word for word in words):
            changes = train if program == "train.py" else {"device": "cpu", "precision": "fp32"}
            kept = [word for word in words if word.partition("=")[0] not in changes]
            finished = in_process(program, *kept, *(f"{key}={value}" for key, value in changes.items()))
            assert finished.status == 0, finished.stderr
            results.append(finished.result)
    (out / "machine.json").write_text((session / "machine.json").read_text())
    assert page.main([str(out), "--out", str(out / "gpu")]) == 0
    (table,) = (
        table
        for table in json.loads((out / "gpu.json").read_text())["tables"]
        if table.get("title") == "Runs of train.py"
    )
    (row,) = table["rows"]
    assert (row["run"], row["epochs"], row["n"]) == ("study-rednet50", "2 of 2", "4")
    assert row["top-1 (%)"] == f"{results[0]['val_top1']:.2f}" == f"{results[1]['top1']:.2f}"
    assert row["minutes"] > 0
    steps = {row["step"]: row["command"] for row in page.steps(out)}
    assert "data.root=FOLDER output_root=OUT/runs model=resnet50" in steps["study-resnet50"]


def test_a_folder_without_photos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(["bash", "scripts/gpu_session.sh", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2
    assert "FOLDER has train/<class>/ and val/<class>/" in run.stderr
    assert page.main([str(tmp_path)]) == 2
    assert "no machine.json" in capsys.readouterr().err
