"""Classes of pixels as pictures: colours laid over photos, beside each other, for boards and contact sheets.

Shapes: H x W pixels; N classes.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from data.cityscapes import CITYSCAPES
from data.decode import BadImageError
from data.mask_list import IGNORED, MaskList, palette
from data.transforms import normalise
from involution.engine.tasks.mean_iou import classify
from involution.visualize import evaluating

SAMPLES = 3  # of the boards' fixed batch
SIDE = 384  # pixels of its pictures at most
STRENGTH = 0.6  # of the colours over the photo


def colours_of(class_names: Sequence[str]) -> np.ndarray:
    """(N, 3) uint8: Cityscapes' own for its classes, else colours that are easy to tell apart."""
    return CITYSCAPES.colours if tuple(class_names) == CITYSCAPES.names else palette(len(class_names))


def overlay(picture: np.ndarray, classes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """A picture (H, W, 3) uint8 under the colours of its classes (H, W); pixels without a class stay as they are."""
    shades = np.zeros((256, 3), np.float32)
    shades[: len(colours)] = colours
    strength = np.full((256, 1), STRENGTH, np.float32)
    strength[len(colours) :] = 0
    mixed = picture * (1 - strength[classes]) + shades[classes] * strength[classes]
    return mixed.round().astype(np.uint8)


class Overlays:
    """A fixed batch of validation pictures, evenly spread; each drawn beside its truth and what the model says."""

    def __init__(self, split: MaskList, mean: Sequence[float], std: Sequence[float], window: Any) -> None:
        self.mean, self.std, self.window, self.colours = mean, std, window, split.colours
        chosen = np.unique(np.linspace(0, len(split) - 1, min(SAMPLES, len(split))).astype(int))
        self.samples: list[tuple[np.ndarray, np.ndarray]] = []
        for index in chosen.tolist():
            with suppress(BadImageError):  # the loader says so
                image, classes = split.read(index)
                self.samples.append((np.asarray(image), classes))

    @torch.no_grad()
    def draw(self, model: nn.Module) -> dict[str, Tensor]:
        """A row a sample: picture, truth, prediction."""
        if not self.samples:
            return {}
        device = next(model.parameters()).device
        rows = []
        with evaluating(model):
            for picture, truth in self.samples:
                pixels = normalise(torch.tensor(picture[None]).to(device), self.mean, self.std)
                found = classify(model, pixels, truth.shape, self.window).cpu().numpy()
                shown = (overlay(picture, classes, self.colours) for classes in (truth, found))
                rows.append(np.concatenate([picture, *shown], 1))
        width = min(3 * SIDE, rows[0].shape[1])
        shrunk = [_to_width(torch.tensor(row).permute(2, 0, 1)[None] / 255, width) for row in rows]
        return {"overlays/picture, truth, prediction": torch.cat(shrunk, 2)[0]}


def _to_width(picture: Tensor, width: int) -> Tensor:
    height = max(1, round(picture.shape[2] * width / picture.shape[3]))
    return F.interpolate(picture, (height, width), mode="bilinear", antialias=True).clamp(0, 1)


def write_sheet(
    sheet: Path, rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], columns: Sequence[str],
    class_names: Sequence[str], shown: Sequence[int],
) -> None:  # fmt: skip
    """Pictures in rows with a title each, under the columns' titles, above a legend of the classes `shown`."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shape = rows[0][0].shape
    width = 4.5 * len(columns)
    height = 4.5 * shape[0] / shape[1] + 0.25
    figure = Figure(figsize=(width, height * len(rows) + 0.3 * -(-len(shown) // 8) + 0.3), layout="constrained")
    for axes, pictures, title in zip(
        figure.subplots(len(rows), len(columns), squeeze=False), rows, titles, strict=True
    ):
        for axis, picture, column in zip(axes, pictures, columns, strict=True):
            axis.imshow(picture)
            axis.set_title(f"{title}: {column}", fontsize=8, loc="left", parse_math=False)
            axis.set_axis_off()
    colours = colours_of(class_names) / 255
    patches = [Patch(color=colours[i], label=class_names[i]) for i in shown if i != IGNORED]
    figure.legend(handles=patches, loc="outside lower center", ncols=8, fontsize=8)
    figure.savefig(sheet, dpi=120)
