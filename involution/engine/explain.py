"""What Hydra and OmegaConf refuse, in a sentence that says what to type instead."""

import os
import re
import sys
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from involution.checks import first_line
from involution.engine import arguments
from involution.engine.config import hint, nearest
from involution.engine.help import leaves
from involution.models import model_options

OF_TRAINING = ("model", "recipe", "augmentation", "optimizer", "schedule", "ablation")  # groups that eval.py lacks


def value(error: OmegaConfBaseException) -> str:
    """What OmegaConf says of a value that it cannot make, with the usual reason."""
    text = first_line(error)
    if "model.backbone" in text:
        names = [argument[6:] for argument in sys.argv[1:] if argument.startswith("model=")] or ["rednet50"]
        text += (
            f". The recipe is for a detector or segmentor; with this backbone: model=faster_rcnn (or retinanet, "
            f"mask_rcnn, semantic_fpn, upernet) model.backbone.name={names[-1]}"
        )
    return text


def composition(error: HydraException, config_dir: str, config_name: str) -> str:
    """Hydra's message, with the nearest valid key or group option."""
    text = str(error).strip()
    if isinstance(error, OverrideParseException):
        return arguments.explain(error.override, sys.argv[1:])
    if sweep := re.match(r"Ambiguous value for argument '(.*)'", text):
        name, _, values = sweep[1].partition("=")
        several = f"several values are a sweep: python train.py -m {sweep[1]} ...; " if config_name == "train" else ""
        return f"{sweep[1]}: {several}a list is '{name}=[{values}]', text with a comma '{name}=\"{values}\"'"
    if key := re.search(r"Could not override '([^']+)'", text):
        if key[1] == "data.train_size":
            return f"there is no key {key[1]}: a detector's sizes are model.min_size and model.max_size"
        near = hint(_nearest_key(key[1], config_dir, config_name))
        if key[1].startswith("model.backbone.") and key[1].rpartition(".")[2] in model_options("rednet50"):
            near = f"; an option that the backbone itself has wants a plus: +{key[1]}=VALUE"
        if config_name == "eval" and key[1].partition(".")[0] in OF_TRAINING:
            near = "; the checkpoint tells the model and how it was trained"
        return f"there is no key {key[1]}{near}"
    if option := re.search(
        r"Could not find '([^']+)'\s+Available options in '([^']+)':\s+(.*?)(?:\s+Config search path|$)",
        text,
        re.DOTALL,
    ):
        group, _, name = option[1].rpartition("/")
        hidden = "as_trained" if config_name == "train" else None
        known = [known for known in option[3].split() if not known.startswith("_") and known != hidden]
        near = hint(nearest(name, known))
        others = f"; one of timm's would be model=timm model.name={name}" if group == "model" and not near else ""
        return f"{group}={name} is unknown{near or others + '.'} Known: {', '.join(known)}"
    return text


def _nearest_key(key: str, config_dir: str, config_name: str) -> list[str]:
    chosen = [argument for argument in sys.argv[1:] if re.fullmatch(r"\w+=\w+", argument)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir, version_base="1.3"):
            groups = os.listdir(config_dir)
            config = compose(config_name, [argument for argument in chosen if argument.split("=")[0] in groups])
    except HydraException:
        return []
    values: Any = OmegaConf.to_container(config)
    keys = [known for known, _ in leaves(values)]
    same_name = [known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]]
    return same_name[:1] or nearest(key, keys)
