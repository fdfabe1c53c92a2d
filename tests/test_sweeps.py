"""Sweeps: the paper's studies, job folders, what is skipped, resumed, reported and refused."""

import json
import signal
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.callbacks import Callbacks
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from omegaconf import OmegaConf
from programs import ROOT, Finished, finish, in_process, kill, python, start
from reliability import saved_step, wait_until

from involution import create_model
from involution.engine.arguments import keep_text
from involution.engine.errors import UserError
from involution.engine.sweep import Job, folder_name, plan

SMALL = [
    "recipe=demo", "device=cpu", "data.loader=torch", "data.workers=0", "train.global_batch_size=16",
    "train.batch_size=8", "train.checkpoint_every_steps=2",
]  # fmt: skip


def planned(root: Path, *arguments: str, ranks: int = 1) -> tuple[Path, list[Job]]:
    """The jobs that `train.py -m` would run."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [*arguments, f"output_root={root}"]
        groups = [argument for argument in overrides if "," not in argument]
        config = compose("train", groups, return_hydra_config=True)
        loader = GlobalHydra.instance().config_loader()
        context = HydraContext(loader, Callbacks())
        sweeper = Plugins.instance().instantiate_sweeper(config=config, hydra_context=context, task_function=print)
        batch, varied = sweeper._combinations(overrides)
        return plan(batch, lambda job: loader.load_sweep_config(config, job), root / str(config.name), varied, ranks)


def result(finished: Finished) -> dict:
    return json.loads(finished.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize(
    ("study", "params_m"),
    [  # the paper's Table 6, digits as counted from its text
        (
            "kernel_size",
            {"kernel_size=3": 14.735, "kernel_size=5": 15.053, "kernel_size=7": 15.530, "kernel_size=9": 16.167},
        ),
        (
            "group_channels",
            {"channels=1": 30.145, "channels=4": 18.453, "channels=16": 15.530, "channels=null": 14.603},
        ),
        ("kernel_generation", {"linear": 18.102, "ratio=1": 19.367, "ratio=4": 15.530, "ratio=16": 14.571}),
        ("stem", {"stem=convolution": 15.530, "stem=involution": 15.541}),
    ],
)
def test_studies_of_the_paper(tmp_path, study, params_m):
    sweep_dir, jobs = planned(tmp_path, f"ablation={study}")
    assert sweep_dir == tmp_path / f"rednet50-imagenet-{study}"
    assert len(jobs) == len(params_m)
    for job in jobs:
        (expected,) = [
            value for end, value in params_m.items() if job.folder.name.split(",model.stem")[0].endswith(end)
        ]
        with torch.device("meta"):
            model = create_model(**job.config["model"] | {"num_classes": 1000})
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(expected, abs=5e-4)
        assert "ablation" not in job.folder.name
        assert not [override for override in job.overrides if override.startswith("ablation")]


def test_seeds_multiply_a_study_and_the_command_line_wins(tmp_path):
    _, jobs = planned(tmp_path, "ablation=stem", "seed=0,1,2")
    assert len(jobs) == 6
    _, jobs = planned(tmp_path, "ablation=kernel_size", "model.kernel_size=3,5", "model.stem=involution")
    assert [job.folder.name for job in jobs] == [
        f"model.kernel_size={k},model.stem=involution" for k in (3, 5)
    ]  # fmt: skip


def test_folders(tmp_path):
    sweep_dir, jobs = planned(tmp_path, "model=rednet26,resnet26", "seed=0,1")
    assert sweep_dir == tmp_path / "sweep-model-seed"
    assert [job.folder.relative_to(sweep_dir).as_posix() for job in jobs] == [
        "model=rednet26,seed=0", "model=rednet26,seed=1", "model=resnet26,seed=0", "model=resnet26,seed=1",
    ]  # fmt: skip
    _, jobs = planned(tmp_path, "data.mean=[0.5,0.5,0.5],[0,0,0]", "data.root=/somewhere", "name=a")
    assert jobs[0].folder == tmp_path / "a" / "data.mean=[0.5,0.5,0.5]"
    assert (
        folder_name("data.exclude=/a/b c.txt")
        == "data.exclude=_a_b_c.txt-" + folder_name("data.exclude=/a/b c.txt")[-8:]
    )
    assert folder_name("data.exclude=/a/b.txt") != folder_name("data.exclude=_a/b.txt")
    long = folder_name("x" * 300)
    assert len(long) <= 200
    assert long != folder_name("x" * 301)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("data.root", ("/a", "/b")), ("data.loader", ("torch", "dali")), ("data.workers", ("0", "1")),
        ("device", ("cpu", "cuda")), ("logging", ("tensorboard", "wandb")), ("train.resume", ("auto", "never")),
        ("name", ("2024_01_02", "2024_0102")), ("name", ("1e3", "1000.0")), ("checkpoint", ("null", "runs/s/seed=0")),
    ],
)  # fmt: skip
def test_every_key_that_varies_gives_folders_of_their_own(tmp_path, key, values):
    _, *arguments = keep_text(["-m", f"{key}={','.join(values)}"])
    sweep_dir, jobs = planned(tmp_path, *arguments)
    assert sweep_dir.parent == tmp_path
    assert [job.folder.name for job in jobs] == [folder_name(f"{key}={value}") for value in values]
    found = [OmegaConf.select(OmegaConf.create(job.config), key) for job in jobs]
    assert list(map(str, found)) == [value.replace("null", "None") for value in values]
    assert not any(key in job.immaterial for job in jobs)


@pytest.mark.parametrize(
    ("recipe", "material"), [
        ("data=folder", True), ("recipe=cityscapes data=segmentation_folder data.classes=[a,b]", True),
        ("recipe=coco data=detection_folder", True), ("recipe=coco", False), ("data=imagenet", False),
    ],
)  # fmt: skip
def test_a_folder_of_ones_own_is_a_data_set_of_its_own(tmp_path, recipe, material):
    _, jobs = planned(tmp_path, *recipe.split(), "data.root=/a", "seed=0,1")
    assert ("data.root" not in jobs[0].immaterial) == material


@pytest.mark.parametrize("key", ["output_root=a,b", "ablation=stem,kernel_size", "hydra.job.name=a,b"])
def test_keys_that_a_sweep_has_one_of(tmp_path, key):
    with pytest.raises(UserError, match=rf"{key.partition('=')[0]} cannot vary within a sweep"):
        planned(tmp_path, key, "seed=0")


def test_batches_must_divide_among_the_ranks_of_each_job(tmp_path):
    with pytest.raises(UserError, match=r"train\.global_batch_size=32 cannot be made"):
        planned(tmp_path, "recipe=demo", "seed=0,1", "train.batch_size=32", ranks=2)
    _, jobs = planned(tmp_path, "recipe=demo", "seed=0,1", ranks=2)
    assert [job.config["train"]["batch_size"] for job in jobs] == [16, 16]


@pytest.mark.slow
def test_failed_jobs_do_not_stop_the_rest_and_finished_ones_are_skipped(tmp_path):
    command = [
        "train.py", "-m", *SMALL, f"output_root={tmp_path}", "name=s", "optimizer.lr=1e30,0.02", "train.max_steps=3",
        "train.max_bad_steps=1", "train.checkpoint_every_steps=null",
    ]  # fmt: skip
    first = python(*command)
    assert first.status == 1, first.stderr
    assert result(first) == {"sweep_dir": str(tmp_path / "s"), "jobs": 2, "finished": 1, "failed": 1}
    assert "1 of 2 jobs failed:\n  optimizer.lr=1e+30" in first.stderr
    assert "Traceback" not in first.stderr
    (finished,) = (tmp_path / "s").glob("*/summary.json")
    assert "lr=0.02" in finished.parent.name
    before = finished.stat().st_mtime_ns
    second = python(*command)
    assert second.status == 1
    assert result(second) == result(first)
    assert second.stderr.count("finished before: ") == 1
    assert finished.stat().st_mtime_ns == before
    assert f"{json.dumps(json.loads(finished.read_text()))}\n" in second.stdout


def test_one_reason_of_all_jobs_is_said_once(tmp_path):
    words = ["data=folder", f"data.root={tmp_path}/nope", "device=cpu", f"output_root={tmp_path}", "name=s"]
    finished = in_process("train.py", "-m", *words, "seed=0,1,2")
    assert finished.status == 1, finished.stderr
    assert result(finished) == {"sweep_dir": str(tmp_path / "s"), "jobs": 3, "finished": 0, "failed": 3}
    first, second, third, last = finished.stderr.strip().splitlines()
    reason = first.partition(" failed: ")[2]
    assert f"data folder '{tmp_path}/nope' does not exist" in reason
    assert second.endswith("seed=1 failed: as a job before")
    assert third.endswith("seed=2 failed: as a job before")
    assert last == f"3 of 3 jobs failed, all of them: {reason}"
    assert not list((tmp_path / "s").iterdir())


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_signal_and_after_a_kill(tmp_path):
    command = [
        sys.executable, "train.py", "-m", *SMALL, f"output_root={tmp_path}", "name=s", "model.kernel_size=3,5",
        "train.max_steps=10",
    ]  # fmt: skip
    folders = sorted(job.folder for job in planned(tmp_path, *command[3:])[1])
    process = start(command)
    wait_until(lambda: saved_step(folders[0]) >= 2, process)
    process.send_signal(signal.SIGTERM)
    stopped = finish(process)
    assert stopped.status == 75, stopped.stderr
    assert not list((tmp_path / "s").glob("*/summary.json"))
    process = start(command)
    wait_until(lambda: saved_step(folders[1]) >= 2, process)
    kill(process)
    again = finish(start(command))
    assert again.status == 0, again.stderr
    assert again.result == {"sweep_dir": str(tmp_path / "s"), "jobs": 2, "finished": 2, "failed": 0}
    assert again.stderr.count("finished before: ") == 1
    assert [(folder / "train.log").read_text().count("going on from") for folder in folders] == [1, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ablation=stem"], "python train.py -m ablation=stem"),
        (
            ["-m", "ablation=stm"],
            "did you mean stem? Known: attention, group_channels, kernel_generation, kernel_size, stem\n",
        ),
        (["-m", "recipe=demo", "model.kernelsize=3,5"], "did you mean model.kernel_size?"),
        (["-m", "recipe=demo", "model.kernel_size=3,4"], "model.kernel_size=4,recipe=demo: kernel_size is 4; it"),
        (["-m", "recipe=demo", "train.epochs=1,0"], "recipe=demo,train.epochs=0: train.epochs=0 should be at least 1"),
        (["-m", "recipe=demo", "train.precision=fp32,fp8"], "fp32, bf16, fp16"),
        (["-m", "recipe=demo", "hydra/launcher=slurm", "seed=0,1"], "needs SLURM's sbatch"),
        (["-m", "recipe=demo", "hydra/launcher=slrm", "seed=0,1"], "did you mean slurm?"),
        (["-m", "recipe=demo", "output_root=/dev/null/runs,/b", "seed=0,1"], "output_root cannot vary within a sweep"),
    ],
)
def test_wrong_input_ends_before_the_first_job(tmp_path, monkeypatch, arguments, message):
    monkeypatch.setenv("PATH", "/nowhere")
    finished = in_process("train.py", *arguments, f"output_root={tmp_path}/runs")
    assert finished.status == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_without_submitit(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    for launcher in ("slurm", "submitit_local"):
        finished = in_process("train.py", "-m", "recipe=demo", "seed=0,1", f"hydra/launcher={launcher}")
        assert finished.status == 2
        assert "pip install submitit" in finished.stderr
