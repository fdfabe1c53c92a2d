"""Starting from trained weights, with a part of the model left as it is."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from involution.checks import few
from involution.engine.config import DataConfig
from involution.engine.errors import UserError
from involution.models import DENSE, StagedNetwork, from_timm, tensors_for
from involution.weights import classifier_of, load_into, open_weights, other_options

log = logging.getLogger("involution")


def start_from(
    model: nn.Module, arguments: dict[str, Any], checkpoint: str, data: DataConfig, class_names: Sequence[str]
) -> None:
    """Load a checkpoint's weights into a fresh model; a classifier for other classes, in number or name, stays fresh.

    Args:
        arguments: of ``create_model`` for it.
        class_names: of the data set. Where the checkpoint does not tell its own, as many classes are the same classes.

    Raises:
        ValueError: the file cannot be used, or is of another model; the message has the differing keys and options.
    """
    opened, head = open_weights(checkpoint), classifier_of(model)
    names, data_there = opened.class_names, opened.data
    log.info("starting from the weights of %s", checkpoint)
    weights: dict[str, Tensor] = {}
    try:
        weights = tensors_for(model, arguments["name"], opened, arguments.get("library"))
        own = {key: value for key, value in model.state_dict().items() if key.startswith(head)}
        as_many = all(key in weights and weights[key].shape == value.shape for key, value in own.items())
        other_classes = as_many and names is not None and list(names) != list(class_names)
        if other_classes:
            weights |= own
        load_into(model, weights)  # says so where the number of classes is another
    except ValueError as error:
        advice = _advice(opened.model, arguments, weights, model)
        raise UserError(f"checkpoint={checkpoint}: {error}{advice}") from error
    if other_classes:
        log.warning(
            "the weights' classifier is for other classes (%s; of the %d here %d are new to it), so it starts afresh; "
            "class folders named as its classes would keep it",
            few(names or ()), len(class_names), len(set(class_names) - set(names or ())),
        )  # fmt: skip
    elif as_many:
        classes = f" ({few(names)})" if names else ", for the weights do not tell the names of theirs"
        log.info("the classifier for %d classes is kept%s", model.num_classes, classes)
    for key in ("mean", "std"):
        if key in data_there and list(data_there[key]) != list(getattr(data, key)):
            log.warning("it was trained with data.%s=%s, here it is %s", key, data_there[key], getattr(data, key))


def _advice(
    trained: dict[str, Any] | None, arguments: dict[str, Any], there: dict[str, Tensor], model: nn.Module
) -> str:
    """The options in which the checkpoint's model differs, as they would be given."""
    if trained is not None and "library" in trained | arguments:
        name = f"model=timm model.name={trained['name']}" if "library" in trained else f"model={trained['name']}"
        return f". It was trained with {name}: take that" if trained["name"] != arguments["name"] else ""
    if arguments["name"] in DENSE and there and not any(key.startswith("backbone.") for key in there):
        return ". These are a classifier's weights; they go into the backbone: model.backbone.pretrained=PATH"
    wanted = [
        f"{'model' if key == 'name' else f'model.{key}'}={'null' if value is None else value}"
        for key, value in other_options(there, model.state_dict()).items()
    ]
    return f". It was trained with {' '.join(wanted)}: add that to the command" if wanted else ""


def freeze(model: StagedNetwork, stages: int | str | Sequence[str]) -> None:
    """Freeze `train.freeze` in the model, which ours take by stages, timm's by their modules' names.

    Raises:
        UserError: for a part that does not exist, or when nothing is left to train.
    """
    try:
        wanted = [stages] if isinstance(stages, str) else stages
        model.freeze(wanted) if isinstance(model, StagedNetwork) else from_timm.freeze(model, wanted)
    except (ValueError, TypeError) as error:
        raise UserError(f"train.freeze={stages}: {error}") from error
    left = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not left:
        raise UserError(f"train.freeze={stages} leaves nothing to train")
    log.info("frozen: %s; %.2f M parameters train", ", ".join(model.frozen), left / 1e6)
