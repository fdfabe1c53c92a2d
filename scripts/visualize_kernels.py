"""Draw Figure 3: pictures and, beside them, heat maps of the kernels that an involution makes for them.

    python scripts/visualize_kernels.py runs/rednet50-imagenet dog.jpg cat.jpg --layer conv3_4 --out kernels

A heat map has, for one group of channels, the sum of each pixel's K x K kernel. Writes OUT.png and OUT.pdf. conv3_4 is
the fourth block of the second stage (layer2); shallower models show the last block of that stage. CHECKPOINT: a path or
URL: a run's folder, a file of train.py, released, .safetensors.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `data`, which is no installed package
from involution.engine.pictures import open_picture
from involution.loading import Classifier, input_channels, load
from involution.visualize import FIGURE3, find_layer, kernel_heat_maps, scaled, visible


def draw(shown: Tensor, maps: Tensor, title: str, out: Path, groups: int) -> list[Path]:
    """Pictures (B, 3, S, S) in [0, 1] and maps (B, G, Ho, Wo) -> out.png, out.pdf."""
    from matplotlib.figure import Figure

    groups = min(groups, maps.shape[1])
    maps = F.interpolate(scaled(maps[:, :groups]), shown.shape[-2:], mode="bilinear", align_corners=False)
    figure = Figure(figsize=(1.4 * (groups + 1), 1.45 * len(shown) + 0.4), layout="constrained")
    axes = figure.subplots(len(shown), groups + 1, squeeze=False)
    for row, picture, heat in zip(axes, shown, maps):
        row[0].imshow(picture.permute(1, 2, 0).numpy())
        for group, axis in enumerate(row[1:]):
            axis.imshow(heat[group].numpy(), cmap="jet", vmin=0, vmax=1)
    for group, axis in enumerate(axes[0][1:]):
        axis.set_title(f"group {group + 1}", fontsize=8)
    for axis in axes.flat:
        axis.axis("off")
    figure.suptitle(title, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    files = [out.with_name(out.name + ending) for ending in (".png", ".pdf")]
    for file in files:
        figure.savefig(file, dpi=90)
    return files


def visualize(arguments: argparse.Namespace) -> list[Path]:
    """Do what the command line says.

    Raises:
        ValueError: for a checkpoint, picture or layer that cannot be used.
    """
    given = [] if arguments.size is None else [("val_size", arguments.size), ("val_resize", arguments.size * 8 // 7)]
    classifier: Classifier = load(arguments.checkpoint, **dict(given))
    layer = find_layer(classifier.model, arguments.layer)
    if layer is None:
        raise ValueError(f"{arguments.checkpoint} has no involutions, hence no kernels to show")
    if arguments.layer is None and layer != FIGURE3:
        print(f"this model has no {FIGURE3}; showing {layer}", file=sys.stderr)
    channels = input_channels(classifier.model)
    images = torch.stack([classifier.transform(open_picture(path, channels)) for path in arguments.images])
    maps = kernel_heat_maps(classifier.model, images, layer)
    title = f"{layer}, {maps.shape[1]} groups, {maps.shape[2]} x {maps.shape[3]} kernels each"
    return draw(visible(images, *normalisation(classifier)), maps, title, arguments.out, arguments.groups)


def normalisation(classifier: Classifier) -> tuple[list[float], list[float]]:
    """Mean and deviation of the channels in [0, 1], read off the transform."""
    last = classifier.transform.transforms[-1]  # type: ignore[attr-defined]
    return list(last.mean), list(last.std)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE")
    parser.add_argument("--layer", help=f"default: {FIGURE3}, or the nearest")
    parser.add_argument("--groups", type=int, default=8, help="heat maps a picture (default 8)")
    parser.add_argument("--size", type=int, help="pixels a side (default: as the model was evaluated in training)")
    parser.add_argument("--out", type=Path, default=Path("kernels"), help="pictures to write, without ending")
    arguments = parser.parse_args()
    try:
        files = visualize(arguments)
    except ValueError as error:
        print(f"visualize_kernels.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(*files)


if __name__ == "__main__":
    main()
