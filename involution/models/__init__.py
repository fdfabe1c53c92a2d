"""The models by name."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from involution.checks import unknown_name
from involution.models import aa, axial, from_timm, lrnet, rednet, resnet, san, standalone
from involution.models.bottleneck import BottleneckNetwork
from involution.models.rednet import RedNet
from involution.models.resnet import ResNet
from involution.models.staged import StagedNetwork
from involution.weights import Weights, load_into, open_weights, other_options
from involution.weights import dense as dense_names
from involution.weights.published import PUBLISHED

MODELS: dict[str, Callable[..., StagedNetwork]] = {
    **rednet.MODELS,
    **resnet.MODELS,
    **san.MODELS,
    **standalone.MODELS,
    **lrnet.MODELS,
    **aa.MODELS,
    **axial.MODELS,
}

#: models of dense prediction, made in ``involution.dense`` of any network above that has bottlenecks
DENSE = ("retinanet", "faster_rcnn", "mask_rcnn", "semantic_fpn", "upernet")


def create_model(
    name: str,
    num_classes: int | None = None,
    pretrained: str | Path | bool | None = None,
    pretrained_sha256: str | None = None,
    library: str | None = None,
    **options: Any,
) -> Any:
    """A model, freshly initialised or with weights from a file.

    Args:
        name: one of ``MODELS`` or ``DENSE``.
        num_classes: outputs of the classifier, 0 for none, 1000 if left out. Segmentors have 19 then, detectors 80 (the
            background does not count).
        pretrained: True for the published weights of this name (``weights.published``), or path or URL of others: ours,
            released, Paddle's, safetensors. A classifier for another number of classes is left out. Downloads are kept
            in the cache folder.
        pretrained_sha256: the SHA-256 of that file or the beginning of it; a mismatch is an error.
        library: "timm" for its models in place of ours; their arguments are ``from_timm.create``'s.
        options: of ``RedNet``, ``ResNet`` or a class of ``involution.dense``, e.g. ``kernel_size=5``.

    Raises:
        ValueError: an unknown name or option (the message has the nearest valid one), an impossible value, or weights
            that cannot be had or are of another model.
    """
    if library not in (None, "timm"):
        raise ValueError(f'library is {library!r}; it should be "timm", or None for the models of this project')
    if library is None and name not in (*MODELS, *DENSE):
        raise ValueError(f'{unknown_name("model", name, (*MODELS, *DENSE))}; library="timm" takes timm\'s')
    valid = from_timm.OPTIONS if library else model_options(name)
    for option in options:
        if option not in valid:
            raise ValueError(unknown_name(f"option of {name}", option, valid))
    if num_classes is not None:
        options["num_classes"] = num_classes
    if pretrained is True:
        if library or name not in PUBLISHED:
            raise ValueError(f"nobody has published weights of {name}; there are some of {', '.join(PUBLISHED)}")
        pretrained = name
    convert = options.pop("convert", False)
    maker = partial(from_timm.create, name) if library else _dense(name) if name in DENSE else MODELS[name]
    model = maker(**options)
    weights = open_weights(pretrained, pretrained_sha256) if pretrained else None
    converted = weights is not None and any(".kernel_generation." in key for key in weights.tensors)
    if convert and converted:
        from_timm.convert(model, convert)
    if weights is not None:
        fill(model, name, weights, library)
    if convert and not converted:  # what has been read stays, the involutions start afresh
        from_timm.convert(model, convert)
    return model


def load_model(location: str | Path, sha256: str | None = None) -> StagedNetwork:
    """The model that a file of weights is of, with these weights; its options are read off the tensors' shapes.

    Args:
        location: path, URL or the name of published weights.
        sha256: the file's SHA-256 or the beginning of it.

    Raises:
        ValueError: the file cannot be had, holds no weights or those of no model of ours.
    """
    return model_of(open_weights(location, sha256))[0]


def model_of(weights: Weights) -> tuple[StagedNetwork, dict[str, Any]]:
    """The model that weights are of, with them, and its arguments of ``create_model``.

    Raises:
        ValueError: they are those of no model of ours.
    """
    options = without_weights(weights.describe())
    model = create_model(**options)
    fill(model, options["name"], weights, options.get("library"))
    return model, options


def fill(model: nn.Module, name: str, weights: Weights, library: str | None = None) -> None:
    """Load weights into a model made by ``create_model`` with this name and library; errors as in ``load_into``, with
    the options in which they differ."""
    tensors = tensors_for(model, name, weights, library)
    try:
        load_into(model, tensors)
    except ValueError as error:
        others = other_options(tensors, model.state_dict())
        told = ", ".join(f"{key}={value!r}" for key, value in others.items())
        raise ValueError(f"{error}. They were trained with {told}" if told else str(error)) from error


def tensors_for(model: nn.Module, name: str, weights: Weights, library: str | None = None) -> dict[str, Tensor]:
    """Weights under the names of such a model: of a detector's file a detector takes all, others the backbone."""
    if library:
        return from_timm.translated(model, weights.tensors)
    return dense_names.to_ours(weights.tensors) if name in DENSE else weights.to_ours()


def without_weights(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``create_model`` without the files that a new model would start from: a trained one needs none."""
    options = {key: value for key, value in options.items() if not key.startswith("pretrained")}
    if isinstance(options.get("backbone"), Mapping):
        options["backbone"] = without_weights(options["backbone"])
    return options


def model_options(name: str) -> list[str]:
    """The options that ``create_model(name, num_classes, ...)`` takes."""
    return list(model_defaults(name))


def model_defaults(name: str) -> dict[str, Any]:
    """The options that ``create_model(name, num_classes, ...)`` takes, and their values when they are left out."""
    maker = _dense(name) if name in DENSE else MODELS[name]
    parameters = inspect.signature(maker).parameters
    return {key: p.default for key, p in parameters.items() if key != "num_classes"}


def _dense(name: str) -> Any:
    from involution import dense  # which imports this module

    return dense.MODELS[name]


__all__ = [
    "DENSE",
    "MODELS",
    "BottleneckNetwork",
    "RedNet",
    "ResNet",
    "StagedNetwork",
    "create_model",
    "load_model",
    "model_defaults",
    "model_options",
    "tensors_for",
    "without_weights",
]
