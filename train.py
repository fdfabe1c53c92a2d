"""Train a model: python train.py [model=rednet50] [data=imagenet data.root=...] [recipe=paper] [KEY=VALUE ...]

The last line of standard output is one JSON object. Exit status: 0 done, 2 wrong input, 75 stopped by a signal with the
state saved (run again to continue), 1 anything else.
"""

import atexit
import dataclasses
import logging
from contextlib import closing
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from involution.engine import cli
from involution.engine.build import build_trainer
from involution.engine.config import TrainConfig, given, validate
from involution.engine.distributed import init_world, leave_world
from involution.engine.options import fit_batch_size
from involution.engine.run import RunFolder, code_version, log_to, same_on_all_ranks
from involution.engine.signals import leave_on_signals

log = logging.getLogger("involution")
CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="train")
@cli.job
def main(composed: DictConfig) -> None:
    config = validate(composed, TrainConfig)
    leave_on_signals()
    world = init_world(config.device, config.train.timeout_minutes)
    atexit.register(leave_world)
    log_to(None, world.is_main)
    if world.is_main and (remark := cli.rate_of_another_optimizer(composed)):
        log.warning(remark)
    same_on_all_ranks("code version", code_version())
    same_on_all_ranks("configuration", dataclasses.asdict(config))
    o, fixed = config.train, "train.batch_size" in given(HydraConfig.get().overrides.task)
    configured = o.batch_size
    o.batch_size = fit_batch_size(o.global_batch_size, configured, world.size, fixed)
    run = RunFolder(Path(HydraConfig.get().runtime.output_dir), world)
    with cli.user_input():
        trainer = build_trainer(config, run, world)
    if o.batch_size != configured:
        log.info(
            "train.batch_size=%d, not %d, so that %d ranks share the global batch", o.batch_size, configured, world.size
        )
    with closing(trainer):
        summary = trainer.fit()
    if world.is_main:
        run.write_summary(summary)
        cli.print_result(summary)


if __name__ == "__main__":
    cli.run(main, str(CONF), "train")
