"""Evaluate a checkpoint: python eval.py checkpoint=PATH [data=... data.root=...] [KEY=VALUE ...]

The last line of standard output is one JSON object: checkpoint, top1, top5 (percent; single centre crop), loss, n. Of a
detector: ap, ap50, ..., with masks mask_ap, ... (percent), n, seconds; with per_class=true also those of every class.
With checkpoint=[a,b] {"results": [those of each]}; results=FILE.csv has them as a table.
With predictions=FILE.csv also what the model says of each image of the data set.
With images=PATH the five likeliest classes of pictures of your own: checkpoint, n, predictions.
"""

import atexit
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from involution.engine import cli
from involution.engine.config import EvalConfig, refuse_other_use, validate
from involution.engine.distributed import init_world, leave_world
from involution.engine.load import evaluate_each, write_results
from involution.engine.predict import predict_images
from involution.engine.run import log_to
from involution.engine.state import use_tf32

CONF = Path(__file__).resolve().parent / "conf"


@hydra.main(version_base="1.3", config_path=str(CONF), config_name="eval")
@cli.job
def main(composed: DictConfig) -> None:
    config = validate(composed, EvalConfig)
    refuse_other_use(config, HydraConfig.get().overrides.task)
    world = init_world(config.device)
    use_tf32(config.tf32)
    atexit.register(leave_world)
    log_to(None, world.is_main)
    if config.images is not None:
        with cli.user_input():
            cli.print_result(predict_images(config, HydraConfig.get().overrides.task, world))
        return
    results = []
    for result in evaluate_each(config, HydraConfig.get().overrides.task, world):
        results.append(result)
        if world.is_main and config.results is not None:
            write_results(config.results, results)  # each time: should the next one fail, these are there
    if world.is_main:
        cli.print_result({"results": results} if isinstance(config.checkpoint, list) else results[0])


if __name__ == "__main__":
    cli.run(main, str(CONF), "eval")
