"""The likeliest classes of the user's own pictures, and the kernels that saw them."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from involution.checks import printable
from involution.engine.config import EvalConfig
from involution.engine.errors import UserError
from involution.engine.pictures import open_picture
from involution.loading import Opened, as_classifier, input_channels
from involution.visualize import find_layer, heat_map_picture, kernel_heat_maps

log = logging.getLogger("involution")
TOP = 5
SHEET = 50  # pictures on a contact sheet; each takes 260 pixels of its height
Classes = list[tuple[str, float]]  # with their probabilities, the likeliest first


class ClassifiedPictures:
    """See Predictor in this folder's __init__.py.

    Raises:
        UserError: a contact sheet is wanted of a model without the layer it shows.
    """

    columns: tuple[str, ...] = ("image", "rank", "class", "confidence")  # a line for every picture and class

    def __init__(self, opened: Opened, config: EvalConfig, told: dict[str, Any], device: torch.device) -> None:
        self.classifier = as_classifier(opened, device, **told)
        self.layer, self.device, self.fold = config.layer, device, config.fold
        self.channels = input_channels(self.classifier.model)
        if config.contact_sheet is not None and find_layer(self.classifier.model, config.layer) is None:
            raise UserError(f"contact_sheet: {config.checkpoint} has no involutions, hence no kernels to show")

    def predict(self, pictures: Sequence[tuple[Path, Any]]) -> list[Classes]:
        return self.classifier.predict([picture for _, picture in pictures], TOP, self.fold)

    def text(self, path: Path, prediction: Classes) -> str:
        return "\n".join([printable(path), *(f"  {100 * p:5.1f} %  {printable(name)}" for name, p in prediction)])

    def as_dict(self, path: Path, prediction: Classes) -> dict[str, Any]:
        return {"image": str(path), "top5": [{"class": name, "confidence": round(p, 6)} for name, p in prediction]}

    def rows(self, path: Path, prediction: Classes) -> Iterator[tuple[Path, int, str, str]]:
        return ((path, rank, name, f"{p:.6f}") for rank, (name, p) in enumerate(prediction, 1))

    def draw(self, sheet: Path, predictions: list[tuple[Path, Classes]]) -> None:
        """A row for every picture, as the model sees it, beside the heat maps of its involution kernels (Figure 3)."""
        from matplotlib.figure import Figure

        if len(predictions) > SHEET:
            log.warning("the contact sheet shows the first %d of %d pictures", SHEET, len(predictions))
            predictions = predictions[:SHEET]
        model, transform = self.classifier.model, self.classifier.transform
        normalise: Any = transform.transforms[-1]  # type: ignore[attr-defined]
        figure = Figure(figsize=(12, 1.75 * len(predictions) + 0.3), layout="constrained")
        name = find_layer(model, self.layer)
        figure.suptitle(f"sums of the kernels of {name}, one map a group; blue is low, red high", fontsize=9)
        rows = figure.subplots(len(predictions), squeeze=False)[:, 0]
        for axes, (image, classes) in zip(rows, predictions, strict=True):
            pixels = transform(open_picture(image, self.channels))[None].to(self.device)
            maps = kernel_heat_maps(model, pixels, self.layer)
            picture = heat_map_picture(pixels, maps, normalise.mean, normalise.std)
            axes.imshow(picture.permute(1, 2, 0).cpu().numpy())
            likeliest = ", ".join(f"{name} {100 * p:.1f} %" for name, p in classes[:3])
            axes.set_title(printable(f"{image.name}: {likeliest}"), fontsize=8, loc="left", parse_math=False)
            axes.set_axis_off()
        figure.savefig(sheet, dpi=150)
