"""What ``${first:...}``, ``${own:...}`` and ``${short_side:...}`` mean in conf/*.yaml."""

import math
from contextlib import suppress
from typing import Any

from omegaconf import DictConfig, OmegaConf

from involution.models import from_timm


def _first(text: str, table: dict[str, Any]) -> Any:
    """${first:TEXT,{KEY:VALUE,...,else:VALUE}} in YAML: the value of the first key that occurs in the text."""
    return next((value for key, value in table.items() if key != "else" and key in text), table["else"])


def _own(key: str, default: Any, *, _root_: DictConfig) -> Any:
    """${own:KEY,DEFAULT} in YAML: how a model of timm wants its pictures prepared; the default for our models."""
    model = _root_.get("model")
    if model and model.get("library") is not None:
        arguments: Any = OmegaConf.to_container(model)
        crop = _root_.data.val_size if key == "val_resize" else None
        # an unknown name or argument is create_model's to explain
        with suppress(ValueError, TypeError, AttributeError):
            default = from_timm.preparation(**arguments, val_size=crop)[key]
    return OmegaConf.create(default) if isinstance(default, list) else default  # OmegaConf resolves to no plain list


def _short_side(share: float, *, _root_: DictConfig) -> int:
    """${short_side:SHARE} in YAML: pixels, of which the validation's crop is that share; rounded down as in timm."""
    return math.floor(_root_.data.val_size / share)


OmegaConf.register_new_resolver("first", _first, replace=True)
OmegaConf.register_new_resolver("own", _own, replace=True)
OmegaConf.register_new_resolver("short_side", _short_side, replace=True)
