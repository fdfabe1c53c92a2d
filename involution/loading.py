"""A checkpoint as a ready-made classifier: the model, the preparation of its pictures, the names of its classes.

Shape legend: B pictures, C channels (3, 1 for gray, or as many bands as the files have), S pixels a side, N classes.
"""

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from involution.folding import fold_parts
from involution.models import DENSE, StagedNetwork, from_timm, model_of
from involution.weights import open_weights

#: how pictures are prepared where a file does not tell: as the authors' released models expect them
IMAGENET = {"val_size": 224, "val_resize": 256, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
GRAY = IMAGENET | {"mean": [0.449], "std": [0.226]}  # their averages
LONGEST = 8  # long side / short side beyond which a picture's ends, far outside the centre crop, are cut off first


class Opened(NamedTuple):
    """What a checkpoint holds."""

    model: StagedNetwork
    class_names: list[str] | None  # None where the file does not tell
    data: dict[str, Any]  # the run's `data` configuration, or its values in IMAGENET's keys alone, or {}
    arguments: dict[str, Any]  # of `create_model`

    @property
    def name(self) -> str:
        """Of the model."""
        return self.arguments["name"]


class _Parts(NamedTuple):
    model: StagedNetwork  # in evaluation mode; (B, C, S, S) -> logits (B, N)
    transform: Callable[[Any], Tensor]  # a picture of any size and mode, or bands (C, H, W) -> (C, S, S)
    class_names: tuple[str, ...]  # N of them


class Classifier(_Parts):
    """A trained model with what it takes to use it."""

    _folded: tuple[Any, torch.nn.Module] | None = None

    def faster(self) -> torch.nn.Module:
        """The model on a CPU folded, for its weights as they are now; elsewhere the model."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        if tensors[0].device.type != "cpu":
            return self.model
        state = [(t.data_ptr(), t._version) for t in tensors]
        if self._folded is None or self._folded[0] != state:
            self._folded = state, fold_parts(self.model)
        return self._folded[1]

    @torch.inference_mode()
    def predict(self, pictures: Sequence[Any], top: int = 5, fold: bool = True) -> list[list[tuple[str, float]]]:
        """For each picture (Pillow's, or a tensor of bands) the likeliest classes with their probabilities.

        ``fold=False``: of the model as it is, whose numbers are those of evaluations to the bit; ``involution.fold``
        changes the last digits and is faster.
        """
        if not self.class_names:
            raise ValueError("these weights have no classifier, so there is nothing to predict")
        first = next(self.model.parameters())
        with ThreadPoolExecutor() as pool:
            pixels = torch.stack([*pool.map(self.transform, pictures)]).to(first.device, first.dtype)
        channels = input_channels(self.model)
        if pixels.shape[1] != channels:
            raise ValueError(
                f"the model's channels, {channels}, are not those of its pictures, {pixels.shape[1]}: mean and "
                "std should have a value for each"
            )
        pixels = pixels.to(memory_format=torch.channels_last)
        logits = (self.faster() if fold else self.model)(pixels)
        best = logits.float().softmax(1).topk(min(top, logits.shape[1]))
        rows = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [[(self.class_names[i], p) for p, i in zip(*row, strict=True)] for row in rows]


def load(checkpoint: str | Path, device: str | torch.device = "cpu", **preparation: Any) -> Classifier:
    """The model of a checkpoint, with its evaluation transform and class names.

    Args:
        checkpoint: a run's folder (its ``best.pt``), a file of ``train.py``, ``.safetensors``, released weights, a URL
            of one, or the name of published weights ("rednet50"). A file that does not tell how pictures are prepared
            gets ImageNet's preparation, and one with 1000 unnamed classes ImageNet's names.
        device: of the model.
        preparation: val_size, val_resize (pixels; by default as val_size changes), mean, std (of the channels, in
            [0, 1]) in place of the file's.

    Raises:
        ValueError: there is no such file, or it is no checkpoint of a classifier.
    """
    return as_classifier(open_checkpoint(checkpoint), device, **preparation)


def as_classifier(opened: Opened, device: str | torch.device = "cpu", **preparation: Any) -> Classifier:
    """An opened checkpoint ready for use; arguments as in ``load``."""
    model, names, data, arguments = opened
    if opened.name in DENSE:
        raise ValueError(
            f"these are weights of a {opened.name}, no classifier: involution.models.load_model opens them"
        )
    told = {key: data.get(key, default) for key, default in (GRAY if input_channels(model) == 1 else IMAGENET).items()}
    if "val_size" in preparation and "val_resize" not in preparation:
        told["val_resize"] = scaled(told["val_resize"], told["val_size"], preparation["val_size"])
    told |= preparation
    if "library" in arguments:
        from_timm.check_sizes(model, arguments, [told["val_size"]])
    model = model.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = _readable(names) if names else _unnamed(model.num_classes)
    names += [str(i) for i in range(len(names), model.num_classes)]  # model.num_classes may exceed the data set's
    return Classifier(model.eval(), evaluation_transform(**told), tuple(names))


def open_checkpoint(location: str | Path) -> Opened:
    """Everything in a checkpoint that outlives training; arguments and errors as in ``load``."""
    weights = open_weights(location)
    model, arguments = model_of(weights)
    names = weights.class_names
    if weights.model is None and names and len(names) != model.num_classes:
        raise ValueError(f"{location} names {len(names)} classes, but its classifier has {model.num_classes}")
    return Opened(model, names, weights.data, arguments)


def scaled(resize: int, crop: int, to: int) -> int:
    """The short side of which a crop of ``to`` pixels leaves as large a share as ``crop`` does of ``resize``."""
    return round(resize * to / crop)


def input_channels(model: torch.nn.Module) -> int:
    """The channels of the pictures that a model takes: those of its first convolution where it does not tell."""
    told = getattr(model, "in_chans", None)
    return told or next(module.in_channels for module in model.modules() if isinstance(module, torch.nn.Conv2d))


def evaluation_transform(
    val_size: int, val_resize: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Any], Tensor]:
    """Short side to ``val_resize``, central crop of ``val_size``, normalisation: what evaluations do. With one value in
    ``mean`` and ``std`` the picture is made gray; with C others than three pictures are tensors (C, H, W), of 8 or 16
    bits or in [0, 1].

    Raises:
        ValueError: torchvision is not installed, or there are not as many values as channels.
    """
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean {list(mean)} and std {list(std)} should both have a value for each channel")
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise ValueError("preparing pictures needs torchvision: pip install torchvision") from error

    def without_ends(picture: Any) -> Any:
        height, width = v2.functional.get_size(picture)
        longest = LONGEST * min(width, height)  # 1 x 20000 resized would take gigabytes
        if max(width, height) <= longest:
            return picture
        left, top = max(0, (width - longest) // 2), max(0, (height - longest) // 2)
        return v2.functional.crop(picture, top, left, height - 2 * top, width - 2 * left)

    to_floats = v2.ToDtype(torch.float32, scale=True)
    cropped = [v2.Lambda(without_ends), v2.Resize(val_resize), v2.CenterCrop(val_size)]
    normalise = v2.Normalize(list(mean), list(std))
    if len(mean) not in (1, 3):
        return v2.Compose([to_floats, *cropped, normalise])
    gray = v2.Grayscale() if len(mean) == 1 else v2.Identity()
    return v2.Compose([v2.Lambda(_rgb), *cropped, gray, v2.PILToTensor(), to_floats, normalise])


def _rgb(picture: Any) -> Any:
    return picture.convert("RGB")


def _readable(names: list[str]) -> list[str]:
    """ImageNet's class folders (n02102040) by their English names, where timm is there to tell them."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return names
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return [info.label_name_to_description(name).split(",")[0] if name in known else name for name in names]


def _unnamed(num_classes: int) -> list[str]:
    if num_classes != 1000:
        return [str(i) for i in range(num_classes)]
    from torchvision.models import ResNet50_Weights

    return list(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
