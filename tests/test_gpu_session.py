"""What scripts/gpu_session.sh runs, as far as a CPU allows, and the page that is made of it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from programs import ROOT
from test_config import config

from involution.weights import run_file
from scripts.gpu import checks, page

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
        run_file.write(out / name / "checkpoints/last.pt", {"model": {"weight": torch.tensor([value])}})
    photos = ["--root", str(out / "photos"), "--batch", "2", "4", "--workers", "1"]
    ghost = ["--batch", "4", "--batchnorm-size", "2", "--out", str(out / "step-ghost.json")]
    assert checks.main(["step", *SMALL, *ghost]) == 0
    runs = ["--runs", str(out / "whole"), str(out / "resumed")]
    two = ["--batch", "2"]
    for name, more in (("machine", []), ("step", two), ("profile", two), ("loader", photos), ("same-bits", runs)):
        assert checks.main([name, "--out", str(out / f"{name}.json"), *SMALL, *more]) == 0
    (out / "synchronisations.json").write_text('{"places": ["meter.py:39"]}')
    (out / "steps.tsv").write_text("step\t124\t240\tpython a\nstep\t0\t31\tpython a\ntests\t1\t9\tpytest\n")
    return out


def test_the_page_says_what_was_measured(session: Path, tmp_path: Path) -> None:
    assert page.main([str(session), "--out", str(tmp_path / "gpu")]) == 0
    text = (tmp_path / "gpu.md").read_text()
    measured = {row["model"]: row for row in json.loads((session / "step.json").read_text())["rows"]}
    for row in measured.values():
        assert row["step (ms)"] >= row["host (ms)"] > 0
        assert row["images/s"] == pytest.approx(2000 / row["step (ms)"])
    ratio = measured["rednet26"]["images/s"] / measured["resnet26"]["images/s"]
    assert f"RedNet's speed in ResNet's: {ratio:.2f} at batch 2" in text
    assert f"docs/cluster.md's r: {measured['rednet26']['images/s']:.0f} images/s at batch 2" in text
    assert "train.batchnorm_size=2" in text
    assert "waits for the GPU in meter.py:39" in text
    assert "stopped and resumed ends with the bits" in text
    assert "Pictures do not change" in text
    assert "data.decoder=cpu" in text
    assert "layer" in text or "conv" in text  # operators of the profile
    rows = json.loads((tmp_path / "gpu.json").read_text())["tables"][0]["rows"]
    assert [(row["step"], row["exit"]) for row in rows] == [("step", 0), ("tests", 1)]


def test_other_weights_are_not_the_same_bits(session: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checks.main(["same-bits", "--runs", str(session / "whole"), str(session / "other")]) == 0
    assert json.loads(capsys.readouterr().out) == {"same": False, "different": ["weight"]}


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


def started(session: Path, out: Path, bin: Path, failing: str) -> list[list[str]]:
    """The words of every python that the session starts, where each but `failing` succeeds."""
    bin.mkdir(exist_ok=True)
    record = bin / "record"
    record.write_bytes(b"")
    lines = [
        "#!/bin/sh",
        f"printf '%s\\037' \"$@\" >> '{record}'; echo >> '{record}'",
        f'case "$*" in *"{failing}"*) exit 3; esac',
    ]
    (bin / "python").write_text("\n".join(lines) + "\n")
    (bin / "python").chmod(0o755)
    environment = os.environ | {"PATH": f"{bin}:{os.environ['PATH']}"}
    words = ["bash", "scripts/gpu_session.sh", "--study", str(session / "photos"), str(out)]
    assert subprocess.run(words, env=environment, capture_output=True).returncode == 0
    return [line.split("\037")[:-1] for line in record.read_text().splitlines()]


def test_every_command_of_the_session_parses_and_what_failed_runs_again(
    session: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    benchmark = importlib.import_module("benchmark")
    commands = started(session, tmp_path / "out", tmp_path / "bin", failing="checks.py profile")
    programs: dict[str, int] = {}
    for program, *words in (words for words in commands if words[0] != "-c"):
        programs[program] = programs.get(program, 0) + 1
        if program == "train.py":
            assert config(*words).train.precision == "bf16"
        elif program == "scripts/benchmark.py":
            monkeypatch.setattr(sys, "argv", [program, *words])
            assert benchmark.parse().device == "cuda"
        elif program == "scripts/gpu/checks.py":
            assert checks.parse(words).check == words[0]
    assert programs["train.py"] == 6
    assert programs["scripts/benchmark.py"] == 7
    assert not (tmp_path / "out" / "profile.done").exists()
    again = started(session, tmp_path / "out", tmp_path / "bin", failing="nothing")
    assert [words[:2] for words in again if words[0] not in ("-c", "scripts/gpu/page.py")] == [
        ["scripts/gpu/checks.py", "machine"],
        ["scripts/gpu/checks.py", "profile"],
    ]


def test_a_folder_without_photos_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = subprocess.run(["bash", "scripts/gpu_session.sh", str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2
    assert "FOLDER has train/<class>/ and val/<class>/" in run.stderr
    assert page.main([str(tmp_path)]) == 2
    assert "no machine.json" in capsys.readouterr().err
