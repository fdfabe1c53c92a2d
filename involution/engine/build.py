"""From a validated configuration to the trainer and its loaders; below here nothing knows the configuration."""

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from involution import complexity, create_model
from involution.checks import SizeError, few, first_line
from involution.engine import boards
from involution.engine.config import TrainConfig
from involution.engine.distributed import World, synchronise, synchronised
from involution.engine.errors import UserError
from involution.engine.finetune import freeze, start_from
from involution.engine.ghost import use_ghost_batches
from involution.engine.meter import forget_peak_memory
from involution.engine.optim import Schedule, build_schedule, parameter_groups, warmup_length
from involution.engine.options import TrainOptions
from involution.engine.resume import origin, state_to_resume
from involution.engine.run import RunFolder, log_to, same_on_all_ranks
from involution.engine.same_run import check_ended, check_same_run
from involution.engine.state import seed_everything, use_tf32
from involution.engine.tasks import DataSet, Setup, check_data
from involution.engine.trainer import Trainer
from involution.models import MODELS, from_timm, model_options, without_weights

log = logging.getLogger("involution")


def build_trainer(config: TrainConfig, run: RunFolder, world: World) -> Trainer:
    """Everything that `train.py` needs, resumed where the run folder has a checkpoint.

    Raises:
        ValueError: for any value, folder or checkpoint that cannot work.
    """
    setup, remark = _check(config, world)
    train, val = setup.open_dataset(config.data)
    if not len(train):
        raise UserError(f"data={config.data.name} in {config.data.root} has no samples to train on")
    config.model["num_classes"] = _num_classes(config.model["num_classes"], train.class_names)
    o, plain = config.train, dataclasses.asdict(config)
    same_on_all_ranks("data set", {"train": train.fingerprint, "val": val.fingerprint})

    run.open()
    log_to(run.path / "train.log", world.is_main)
    if world.is_main:
        _tell_sizes(train, val, o.global_batch_size)
    state = state_to_resume(o.resume, run, world)
    same_on_all_ranks("checkpoint to resume", {"step": state and state["step"]})
    changed = {} if state is None else check_same_run(state, plain, train)

    seed_everything(config.seed, world, config.deterministic, setup.SIZES_VARY)
    use_tf32(o.tf32)
    forget_peak_memory(world.device)
    model = _make_model(config, setup, train.class_names, world, fresh=state is None, remark=remark)
    train_loader = setup.train_loader(train, config, world)
    o = o.in_epochs(train_loader.steps_per_epoch)
    trainer = Trainer(
        model,
        setup.build(config),
        build_optimizer(config.optimizer, parameter_groups(model, o.exclude_from_decay, o.layer_decay)),
        _schedule(config, o, train_loader.steps_per_epoch, world),
        train_loader,
        setup.eval_loader(val, config.data, setup.EVAL_BATCH or o.batch_size, world),
        val_size=len(val),
        options=o,
        world=world,
        run=run,
        extra_state={
            "config": plain,
            "class_names": list(train.class_names),
            "data": train.fingerprint,
            "origin": origin(o.resume) or (state or {}).get("origin"),
        },
        gallery=setup.gallery(val, config.data) if world.is_main else None,
    )
    if state is not None:
        trainer.load_state_dict(state)
    if trainer.ended:
        check_ended(changed, beyond=trainer.step > trainer.limit)
    if world.is_main and not (trainer.ended and run.described):
        run.describe(plain, world)
        run.rewind_metrics(trainer.closed)
    return trainer


def _check(config: TrainConfig, world: World) -> tuple[Setup, str]:
    """Refuse before any data is read what cannot work; the task, and what `check_model` has to say."""
    o = config.train
    o.check()
    if o.sync_batchnorm is True and world.device.type == "cpu":
        raise UserError("train.sync_batchnorm=true needs GPUs; torch has no SyncBatchNorm for the CPU")
    setup = check_data(config.model["name"], config.data.name)
    remark = check_model(config.model)
    setup.check(config, world)
    build_optimizer(config.optimizer, [{"params": [torch.nn.Parameter(torch.zeros(1, 1))]}])
    _check_deterministic(config, world)
    if o.cuda_graphs:
        _check_graphs(config, world, setup.SIZES_VARY)
    boards.check(config.logging)
    return setup, remark


def _make_model(
    config: TrainConfig, setup: Setup, class_names: Sequence[str], world: World, *, fresh: bool, remark: str
) -> torch.nn.Module:
    """The model as it is trained, on its device: with weights to start from where it is `fresh`."""
    o, options = config.train, config.model
    model: Any = create_model(**options if fresh else without_weights(options))
    if config.checkpoint is not None and fresh:
        start_from(model, options, config.checkpoint, config.data, class_names)
    if o.freeze is not None:
        freeze(model, o.freeze)
    if world.is_main:
        log.info("%s\n%s%s", options["name"], remark, _cost(model, setup.input_shape(config.data)))
    model = to_device(model, world.device, o.channels_last)
    if o.batchnorm_size is not None:
        use_ghost_batches(model, o.batchnorm_size)
    torch.manual_seed(config.seed + world.rank)  # dropout and stochastic depth of every rank's own
    return synchronise(model) if synchronised(o.sync_batchnorm, world) else model


def _schedule(config: TrainConfig, o: TrainOptions, steps_per_epoch: int, world: World) -> Schedule:
    steps = o.steps or (o.epochs or 0) * steps_per_epoch
    if (warm := warmup_length(steps_per_epoch, **config.schedule)) >= steps and world.is_main:
        log.warning("the warm-up of %d steps takes all of this run's %d: optimizer.lr is never reached", warm, steps)
    return build_schedule(config.optimizer["lr"], steps, steps_per_epoch, **config.schedule)


def _tell_sizes(train: DataSet, val: DataSet, global_batch_size: int) -> None:
    log.info(
        "%d samples to train on, %d to validate, %d classes: %s",
        len(train), len(val), len(train.class_names), few(train.class_names),
    )  # fmt: skip
    if global_batch_size > len(train):
        log.warning(
            "train.global_batch_size=%d is more than there are samples: an epoch is one step of %d. "
            "recipe=finetune and recipe=study have small batches", global_batch_size, len(train),
        )  # fmt: skip


def _check_graphs(config: TrainConfig, world: World, sizes_vary: bool) -> None:
    o, reason = config.train, None
    if world.device.type != "cuda":
        reason = "they are a GPU's, and this run is on the CPU"
    elif sizes_vary:
        reason = "they are for one size of pictures, and every batch of a detector's has its own"
    elif o.compile:
        reason = "train.compile=true makes programs of its own: choose one of them"
    elif synchronised(o.sync_batchnorm, world) and world.size > 1:
        reason = "with train.sync_batchnorm ranks talk within the forward; train.sync_batchnorm=false goes with them"
    elif world.size > 1 and isinstance(getattr(config.data, "train_size", None), dict):
        reason = "on several GPUs data.train_size has to be one size: what is captured comes before what they exchange"
    if reason is not None:
        raise UserError(f"train.cuda_graphs=true: {reason}")


def _check_deterministic(config: TrainConfig, world: World) -> None:
    """torch and torchvision have no repeatable backward for some layers on a GPU, or one that takes gigabytes a box."""
    model = config.model
    if not config.deterministic or world.device.type != "cuda":
        return
    for found, what in (
        (model["name"] == "upernet", "model=upernet (its pooling); semantic_fpn can be"),
        (model.get("global_pool") in ("max", "avgmax"), f"model.global_pool={model.get('global_pool')}; avg can be"),
        (str(model.get("plugin")).startswith("dcn"), f"model.plugin={model.get('plugin')}"),
        (model.get("roi_samples") == 0, "model.roi_samples=0 (RoIAlign); 2 can be, as torchvision's detectors have it"),
    ):
        if found:
            raise UserError(f"deterministic=true: on a GPU training cannot be repeated to the bit with {what}")


def _cost(model: torch.nn.Module, shape: tuple[int, int, int]) -> str:
    """The table of parameters and FLOPs."""
    try:
        return str(complexity.count(model, shape))
    except SizeError:
        raise
    except Exception as error:  # whatever a model of timm's does with shapes alone
        return f"its FLOPs cannot be counted: {first_line(error)}"


def check_model(options: dict[str, Any]) -> str:
    """Refuse wrong options before any data is read.

    `drop_path_rate`, which recipes set for any model, goes to the constructor of timm's; it is left out where a model
    has none.

    Returns:
        A line that says so, or nothing.

    Raises:
        ValueError: naming the option.
    """
    name, rate, timms = options["name"], options.get("drop_path_rate"), "library" in options
    if timms:
        has_it = rate is None or from_timm.has_stochastic_depth(name)
    else:
        has_it = name not in MODELS or "drop_path_rate" in model_options(name)
    if timms or not has_it:
        options.pop("drop_path_rate", None)
    if timms and has_it and rate is not None and isinstance(options.get("options") or {}, dict):
        options["options"] = {"drop_path_rate": rate} | (options.get("options") or {})
    with torch.device("meta"):
        create_model(**without_weights(options) | {"num_classes": 1})
    return "" if has_it or not rate else f"{name} has no stochastic depth: model.drop_path_rate={rate} is left out\n"


def to_device(model: torch.nn.Module, device: torch.device, channels_last: bool) -> torch.nn.Module:
    return model.to(device).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def _num_classes(configured: int | None, class_names: Sequence[str]) -> int:
    if configured is not None and configured < len(class_names):
        count = len(class_names)
        raise UserError(
            f"model.num_classes={configured}, but the data set has {count} classes; "
            f"leave it out, or give {count} or more"
        )
    return configured or len(class_names)


def build_optimizer(config: dict[str, Any], groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        return instantiate({**config, "_partial_": True, "_convert_": "all"})(groups)
    except (TypeError, ValueError, IndexError, InstantiationException) as error:
        option = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        advice = f": leave it out, or add '~optimizer.{option[1]}' to the command" if option else ""
        raise UserError(
            f"optimizer {config['_target_']}: {first_line(error)}. The option comes from a recipe made for "
            f"another optimizer or from the command line{advice}"
        ) from error
