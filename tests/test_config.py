"""Every configuration composes; the recipes say what the paper says; what is impossible is refused with advice."""

import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from programs import ROOT, in_process, kill, python, start, torchrun

from involution.engine.build import check_model
from involution.engine.config import EvalConfig, TrainConfig, validate
from involution.engine.errors import UserError
from involution.engine.options import fit_batch_size
from involution.engine.tasks import detection, segmentation

CONF = ROOT / "conf"
OPTIONS = [
    f"{group.name}={option.stem}"
    for group in sorted(CONF.iterdir())
    if group.is_dir() and group.name != "hydra"
    for option in sorted(group.glob("[!_]*.yaml"))
]


def config(*overrides: str, program: str = "train"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return validate(compose(program, list(overrides)), TrainConfig if program == "train" else EvalConfig)


# of another task than the default's, hence with a recipe for that
RECIPES = {
    f"{group}={name}": recipe
    for recipe, models, task in (
        ("recipe=cityscapes", ("semantic_fpn", "upernet"), segmentation),
        ("recipe=coco", detection.PARTS, detection),
    )
    for group, names in (("model", models), ("data", task.DATASETS))
    for name in names
}


@pytest.mark.parametrize("option", [option for option in OPTIONS if option != "data=as_trained"])
def test_every_option_composes(option):
    needed = {"model=timm": ["model.name=resnet10t"], "optimizer=timm": ["optimizer.name=lamb"]}.get(option, [])
    check_model(config(*filter(None, [RECIPES.get(option), option]), "checkpoint=WEIGHTS", *needed).model)


@pytest.mark.parametrize("recipe", ["paper", "rsb_a1", "rsb_a3", "swin"])
def test_recipes_take_any_classifier(recipe):
    """timm's get the stochastic depth and keep their own sizes; models that have none do without."""
    rate = {"paper": None, "rsb_a1": 0.05, "rsb_a3": 0.0, "swin": 0.1}[recipe]
    for name in ("resnet50", "vgg11"):  # of 288 and 224 pixels
        found = config(f"recipe={recipe}", "model=timm", f"model.name={name}")
        remark = check_model(found.model)
        assert "drop_path_rate" not in found.model
        wanted = {"drop_path_rate": rate} if name == "resnet50" and rate is not None else None
        assert found.model["options"] == wanted
        assert ("has no stochastic depth" in remark) == (name == "vgg11" and bool(rate))
        assert found.data.val_size == {"resnet50": 288, "vgg11": 224}[name]
        assert found.data.val_resize >= found.data.val_size
    assert ("has no stochastic depth" in check_model(config(f"recipe={recipe}", "model=lrnet26").model)) == bool(rate)
    found = config(
        "recipe=rsb_a1", "data=demo", "model=timm", "model.name=resnet18", "model.options={drop_path_rate: 0.7}"
    )
    check_model(found.model)
    assert found.model["options"] == {"drop_path_rate": 0.7}
    assert (found.data.val_size, found.data.val_resize) == (32, 33)


def test_the_default_is_the_paper():
    found = config()
    assert found.model == {
        "name": "rednet50", "num_classes": None, "kernel_size": 7, "group_channels": 16, "reduction_ratio": 4,
        "kernel_generation": "bottleneck", "kernel_activation": None, "stem": "involution", "stem_kernel_size": 3,
        "zero_init_residual": True, "in_chans": 3, "drop_path_rate": 0.0, "drop_rate": 0.0, "global_pool": "avg",
    }  # fmt: skip
    assert found.train.epochs == 130
    assert found.train.global_batch_size == 64 * found.train.batch_size == 64 * 32
    assert found.train.label_smoothing == 0.1
    assert found.train.ema_decay is None
    assert found.train.clip_grad_norm is None
    assert found.train.exclude_from_decay == "none"
    optimizer = {key: found.optimizer[key] for key in ("_target_", "lr", "momentum", "nesterov", "weight_decay")}
    assert optimizer == {
        "_target_": "torch.optim.SGD", "lr": 0.8, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4,
    }  # fmt: skip
    assert found.schedule == {
        "name": "cosine",
        "warmup_epochs": 0,
        "warmup_steps": None,
        "warmup_start": 0.25,
        "min_lr": 0.0,
    }
    assert tuple(found.augmentation.scale) == (0.08, 1.0)
    assert tuple(found.augmentation.ratio) == pytest.approx((3 / 4, 4 / 3))
    assert found.augmentation.hflip == 0.5
    assert (found.data.train_size, found.data.val_size, found.data.val_resize) == (224, 224, 256)


def test_the_released_recipe_adds_nesterov_and_warmup_alone():
    paper, released = config(), config("recipe=released")
    assert released.optimizer == paper.optimizer | {"nesterov": True}
    assert released.schedule == paper.schedule | {"warmup_epochs": 5}
    assert released.train == paper.train


def test_every_recipe_has_a_run_folder_of_its_own():
    recipes = [option for option in OPTIONS if option.startswith("recipe=")]
    names = [config(recipe, "checkpoint=WEIGHTS").name for recipe in recipes]
    assert len({*names}) == len(recipes) > 5, names


def test_the_command_line_overrides_the_recipe():
    found = config("recipe=demo", "model=resnet26", "data=cifar10", "optimizer.lr=0.3", "train.epochs=1")
    assert (found.model["name"], found.data.name, found.optimizer["lr"], found.train.epochs) == (
        "resnet26", "cifar10", 0.3, 1,
    )  # fmt: skip
    assert found.name == "demo-resnet26"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.precision=fp8", "fp32, bf16, fp16"),
        ("train.epochs=0", "at least 1"),
        ("train.epochs=many", r"^train\.epochs=many should be a whole number$"),
        ("train.epochs=1.5", r"^train\.epochs=1\.5 should be a whole number$"),
        ("train.tf32=maybe", r"^train\.tf32=maybe should be true or false$"),
        ("data.mean=[a,0,0]", r"^data\.mean\[0\]=a should be a number$"),
        ("data=as_trained", r"data=as_trained is for eval\.py"),
        ("train.label_smoothing=1.5", "between 0 and 1"),
        ("augmentation.mixup=abc", r"^augmentation\.mixup=abc should be a number$"),
        ("model.drop_path_rate=2", r"model\.drop_path_rate=2 should be between 0 and 1"),
        ("optimizer.lr=fast", r"optimizer\.lr=fast should be a number"),
        ("data.loader=dally", "did you mean dali"),
        ("+train.epoch=3", r"Key 'epoch' not in 'TrainOptions'; did you mean epochs\?"),
    ],
)
def test_impossible_values(override, message):
    with pytest.raises(UserError, match=message):
        config(override)


def test_batches_that_do_not_divide_list_ones_that_do():
    for ranks in (1, 64):
        assert fit_batch_size(2048, 32, ranks) == fit_batch_size(2048, 32, ranks, fixed=False) == 32
    with pytest.raises(UserError, match=r"train\.batch_size=48 on 8.*32, 64.*1920, 2304"):
        fit_batch_size(2048, 48, 8)
    with pytest.raises(UserError, match="Global batch sizes that fit: 96, 192"):
        fit_batch_size(100, 32, 3, fixed=False)
    assert fit_batch_size(100, 32, 2, fixed=False) == 25
    with pytest.raises(UserError, match="Batch sizes that fit: 1, 37"):  # not one image at a time, unasked
        fit_batch_size(74, 32, 2, fixed=False)
    assert fit_batch_size(8, 2, 8, fixed=False) == 1


@pytest.mark.parametrize("recipe", [option for option in OPTIONS if option.startswith("recipe=")])
def test_every_recipe_runs_on_any_usual_number_of_ranks(recipe):
    o = config(recipe, "checkpoint=WEIGHTS").train
    for ranks in (1, 2, 4, 8):
        size = fit_batch_size(o.global_batch_size, o.batch_size, ranks, fixed=False)
        assert o.global_batch_size % (size * ranks) == 0
        assert size == min(o.batch_size, o.global_batch_size // ranks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train.epoch=3"], "there is no key train.epoch; did you mean train.epochs?"),
        (["recipe=demo", "lr=3"], "there is no key lr; did you mean optimizer.lr?"),
        (["model=rednet5"], "model=rednet5 is unknown; did you mean rednet50?"),
        (["data=folders"], "data=folders is unknown; did you mean folder? Known: cifar10, "),  # not as_trained
        (["model.group_channels=64"], "group_channels=64 does not divide the stem's 32 channels: take one of 1, 2, "),
        (["model.kernel_size=3,5"], "several values are a sweep: python train.py -m model.kernel_size=3,5 ..."),
        (["data.mean=0,0,0"], "a list is 'data.mean=[0,0,0]', text with a comma 'data.mean=\"0,0,0\"'"),
        (["model.kernel_size=4"], "kernel_size is 4; it should be odd, for the window to have a centre"),
        (["data=folder"], "set data.root"),
        (
            ["data=folder", "data.root=/nowhere"],
            "data folder '/nowhere' does not exist; set data.root to the folder with",
        ),
        (["recipe=demo", "train.batch_size=48"], "Batch sizes that fit: "),
        (["recipe=demo", "model.num_classes=5"], "the data set has 10 classes; leave it out, or give 10 or more"),
        (
            ["recipe=demo", "optimizer=adamw", "+optimizer.momentum=0.9"],
            "the command line: leave it out, or add '~optimizer.momentum' to the command",
        ),
        (["recipe=demo", "optimizer=timm"], "optimizer.name is not set; give it as optimizer.name=NAME"),
        (["recipe=demo", "train.resume=nowhere.pt"], "there is no checkpoint nowhere.pt"),
        (["device=cuda"], "use device=cpu"),
        (["recipe=demo", "logging=wanbd"], "should be one of tensorboard, wandb; did you mean wandb?"),
        (["train.sync_batchnorm=true", "device=cpu"], "train.sync_batchnorm=true needs GPUs"),
        (["recipe=demo", "train.batch_size=8", "train.batchnorm_size=3"], "Take train.batch_size=9, for example"),
        (
            ["recipe=demo", "augmentation.mixup=0.2", "train.batch_size=1"],
            "train.batch_size=1 leaves none to mix with",
        ),
        (["recipe=demo", "augmentation.randaugment=9", "augmentation.trivialaugment=true"], "exclude each other"),
        (["recipe=demo", "augmentation.randaugment=rand-m9"], "-inc1"),
        (["recipe=demo", "augmentation.color_jitter=[1,2]"], "[brightness,contrast,saturation]"),
        (["recipe=rsb_a1", "model=faster_rcnn", "data=demo_detection"], "choose recipe=cityscapes"),
        (["recipe=demo", "augmentation.scale=[0.5]"], "must be (low, high)"),
        (["recipe=rsb_a2", "train.loss=cross_entropy"], "train.target_threshold=0.2 is for train.loss=bce"),
        (["recipe=demo", "augmentation.repeats=33"], "no more than train.global_batch_size=32"),
        (["recipe=demo", "train.target_threshold=0.2"], "train.target_threshold=0.2 is for train.loss=bce"),
        (["recipe=demo", "data.mean=[0.5]"], "data.mean=[0.5] should have a value for each of the model's channels, 3"),
        (["recipe=demo", "data.std=[1,1,1,1]"], "for example data.std=[1.0,1.0,1.0]"),
        (["recipe=demo", "data.std=[0.5,0,0.5]"], "should be greater than 0"),
        (["recipe=demo", "model.in_chans=1"], "for example data.mean=[0.5]"),
        (["recipe=demo", "model.in_chans=0"], "model.in_chans=0 should be 3, 1 for gray pictures"),
        (["recipe=demo", "model.in_chans=4"], "for example data.mean=[0.5,0.5,0.5,0.5]"),
        (["recipe=finetune", "data.root=photos"], "checkpoint is not set; give it as checkpoint=PATH"),
        (["recipe=demo", "name="], "name is not set"),
        (["recipe=demo", "output_root="], "output_root is not set; give it as output_root=PATH"),
        (["recipe=demo", "name=a/../../b"], "name=a/../../b should be the name of a folder inside output_root"),
        (["recipe=demo", "data.mean=[nan,0,0]"], "data.mean=[nan, 0.0, 0.0] should be finite"),
        (["recipe=demo", "optimizer.lr=inf"], "optimizer.lr=inf should be finite and at least 0"),
        (["recipe=demo", "=3"], "=3 has no key in front of the ="),
        (["recipe=demo", "seed =3"], "no blanks around the =, please: seed=3"),
        (["recipe=demo", "data.mean=(0,0,0)"], "lists are written in brackets: 'data.mean=[0,0,0]'"),
        (["recipe=demo", "data.mean=[0,0,0"], "the [ is not closed: 'data.mean=[0,0,0]'"),
        (
            ["recipe=demo", "data.train_size={0:", "64,", "3:", "96}"],
            "put the whole argument in quotes for the shell: 'data.train_size={0: 64, 3: 96}'",
        ),
        (["recipe=coco", "data.train_size=640"], "a detector's sizes are model.min_size and model.max_size"),
        (["recipe=coco", "model.backbone.stem_kernel_size=3"], "wants a plus: +model.backbone.stem_kernel_size=VALUE"),
        (["recipe=coco", "model.backbone.freez=1"], "no key model.backbone.freez; did you mean model.backbone.freeze?"),
        (["recipe=demo", "data.mean=[0,0,0", "data.std=[1,1,1]"], "the [ is not closed: 'data.mean=[0,0,0]'"),
        (["recipe=demo", "optimizer.lr=1=2"], "optimizer.lr=1=2: a value with = needs quotes of its own"),
        (["recipe=demo", "optimizer.lr=é"], "a value with é needs quotes of its own, inside the shell's, for letters"),
        (["recipe=demo", "data.root=/my", "photos"], "put both in quotes: 'data.root=/my photos'"),
        (["recipe=demo", "output_root=/dev/null/runs"], "cannot write to /dev/null/runs"),
        (["recipe=demo", "output_root={tmp}", "name=taken"], "taken: File exists; set output_root to a folder"),
        (["recipe=demo", f"name={'n' * 300}"], "File name too long"),
        (["model.name=resnet50"], "model.name is for model=timm; this project's networks are chosen by model=resnet50"),
        (
            ["recipe=coco", "model=rednet26"],
            "with this backbone: model=faster_rcnn (or retinanet, ",
        ),
        (
            ["recipe=demo_detection", "model=rednet26"],
            "s or segmentor's backbone: model.backbone.name=red",
        ),
        (["model=convnext_tiny"], "is unknown; one of timm's would be model=timm model.name=convnext_tiny. Known: aa_"),
        (["--model", "rednet50"], "--model: options are KEY=VALUE, without dashes, as in model=rednet50"),
        (["recipe=demo", "data.train_size=[64,64]"], "expected a positive number of pixels or {epoch: pixels}"),
        (
            ["recipe=demo", "data.loader=torch", "data.workers=0", "train.batch_size=1", "train.global_batch_size=2"],
            "train.batch_size=1 leaves it one pixel of one image",
        ),
        (["train.epochs", "=", "3"], "no blanks around the =, please: train.epochs=VALUE"),
        (["seed=0,"], "nothing after the last comma"),
    ],
)
def test_wrong_input_ends_with_one_message_and_status_2(tmp_path: Path, arguments, message):
    if arguments == ["device=cuda"]:
        arguments = [*arguments, "recipe=demo"]
    if arguments[0] == "device=cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    (tmp_path / "taken").touch()
    arguments = [argument.replace("{tmp}", str(tmp_path)) for argument in arguments]
    finished = in_process("train.py", f"output_root={tmp_path}/runs", *arguments)
    assert finished.status == 2
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    assert not list(tmp_path.rglob("*.pt"))


def test_a_run_that_never_began_leaves_no_folder(tmp_path: Path):
    assert in_process("train.py", f"output_root={tmp_path}/runs", "data=folder").status == 2
    assert list((tmp_path / "runs").iterdir()) == []


SMALL = ["recipe=demo", "device=cpu", "data.loader=torch", "data.workers=0"]


def test_nor_does_one_that_was_refused_after_it_took_its_folder(tmp_path: Path):
    words = [*SMALL, f"output_root={tmp_path}", "name=run", "train.freeze=9"]
    for before in ([], ["notes.txt"]):
        (tmp_path / "run").mkdir()
        for name in before:
            (tmp_path / "run" / name).touch()
        finished = in_process("train.py", *words)
        assert finished.status == 2, finished.stderr
        left = [path.name for path in tmp_path.rglob("*")]
        assert sorted(left) == ([".lock", *before, "run", "train.log"] if before else [])


def test_a_refused_run_leaves_the_files_of_one_that_has_the_lock(tmp_path: Path):
    (tmp_path / "run").mkdir()
    lock = tmp_path / "run" / ".lock"
    hold = f"import fcntl, signal; file = open({str(lock)!r}, 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print()"
    other = start([sys.executable, "-c", f"{hold}; signal.pause()"])
    other.stdout.readline()  # it has the lock
    (tmp_path / "run" / "train.log").touch()
    finished = in_process("train.py", *SMALL, f"output_root={tmp_path}", "name=run", "train.max_steps=1")
    kill(other)
    assert finished.status == 2, finished.stderr
    assert "another run is writing to" in finished.stderr
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "train.log"]


def test_a_process_ends_with_status_2_and_no_traceback(tmp_path: Path):
    finished = python("train.py", f"output_root={tmp_path}", "train.epoch=3")
    assert finished.status == 2
    assert finished.stderr == "train.py: there is no key train.epoch; did you mean train.epochs?\n"


def test_a_sweep_under_torchrun_is_refused():
    finished = torchrun(2, "train.py", "-m", "recipe=demo", "seed=0,1")
    assert finished.status != 0
    assert "python train.py -m" in finished.stderr
