"""Figure 3 while a run trains: what the model's kernels see in a few validation images, always the same."""

from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

import data
from data import ImageList
from involution.engine.config import DataConfig
from involution.visualize import find_layer, heat_map_picture, kernel_heat_maps

IMAGES = 4
SIDE = 112  # pixels at most: a picture of four images with eight heat maps each then takes about half a megabyte


class HeatMaps:
    """A fixed batch of validation images, evenly spread over the list of files and hence over the classes."""

    def __init__(self, images: ImageList, d: DataConfig) -> None:
        self.normalisation: dict[str, Any] = {"mean": d.mean, "std": d.std}
        chosen = images.select(np.unique(np.linspace(0, len(images) - 1, IMAGES).astype(int)))
        loader = data.eval_loader(
            chosen, batch_size=len(chosen), val_size=d.val_size, val_resize=d.val_resize, **self.normalisation,
            loader="torch", workers=0, max_pixels=d.max_pixels, on_error="skip",
        )  # fmt: skip
        batch = next(iter(loader))
        self.images = batch.images[: batch.valid]

    def draw(self, model: nn.Module) -> dict[str, Tensor]:
        """{title: picture (3, H, W) in [0, 1]}; empty for a model without involutions. The model stays as it is."""
        layer = find_layer(model)
        if layer is None or not len(self.images):
            return {}
        images = self.images.to(next(model.parameters()).device)
        maps = kernel_heat_maps(model, images, layer)
        if images.shape[-1] > SIDE:
            images = F.interpolate(images, (SIDE, SIDE), mode="bilinear", antialias=True)
        return {f"kernels/{layer}": heat_map_picture(images, maps, **self.normalisation)}
