"""The models by name."""

import inspect
from collections.abc import Callable
from typing import Any

from involution.checks import unknown_name
from involution.models import rednet, resnet
from involution.models.bottleneck import BottleneckNetwork
from involution.models.rednet import RedNet
from involution.models.resnet import ResNet

MODELS: dict[str, Callable[..., BottleneckNetwork]] = {
    "rednet26": rednet.rednet26,
    "rednet38": rednet.rednet38,
    "rednet50": rednet.rednet50,
    "rednet101": rednet.rednet101,
    "rednet152": rednet.rednet152,
    "resnet26": resnet.resnet26,
    "resnet38": resnet.resnet38,
    "resnet50": resnet.resnet50,
    "resnet101": resnet.resnet101,
    "resnet152": resnet.resnet152,
}


def create_model(name: str, num_classes: int = 1000, **options: Any) -> BottleneckNetwork:
    """A freshly initialised model.

    Args:
        name: one of ``MODELS``.
        num_classes: outputs of the classifier; 0 for none.
        options: of ``RedNet`` or ``ResNet``, e.g. ``kernel_size=5``.

    Raises:
        ValueError: an unknown name or option (the message has the nearest valid one), or an impossible value.
    """
    if name not in MODELS:
        raise ValueError(unknown_name("model", name, MODELS))
    valid = model_options(name)
    for option in options:
        if option not in valid:
            raise ValueError(unknown_name(f"option of {name}", option, valid))
    return MODELS[name](num_classes=num_classes, **options)


def model_options(name: str) -> list[str]:
    """The options that ``create_model(name, num_classes, ...)`` takes."""
    model_class = RedNet if name.startswith("rednet") else ResNet
    return [p for p in inspect.signature(model_class).parameters if p not in ("depths", "num_classes")]


__all__ = ["MODELS", "BottleneckNetwork", "RedNet", "ResNet", "create_model", "model_options"]
