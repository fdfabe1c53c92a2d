"""Figure 4: pictures of a validation set, their truth, and what two (or more) models say, side by side.

    python scripts/compare_segmentation.py RUN_A RUN_B [--root FOLDER] [--samples 4] --out figure4.png

RUN: whatever eval.py takes as checkpoint=. The pictures are of the data set that the first one was trained on.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # data/ is used from the checkout

from data.transforms import normalise
from involution.engine.tasks import segmentation, task_of
from involution.engine.tasks.mean_iou import classify
from involution.engine.tasks.overlays import colours_of, overlay, write_sheet
from involution.loading import open_checkpoint


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--root", help="the data set's folder (default: where it was in training)")
    parser.add_argument("--samples", type=int, default=4, help="pictures, spread over the validation set (default 4)")
    parser.add_argument("--out", type=Path, default=Path("figure4.png"), help="picture to write: .png or .pdf")
    arguments = parser.parse_args()
    try:
        draw(arguments.runs, arguments.root, arguments.samples, arguments.out)
    except (ValueError, OSError) as error:
        print(f"compare_segmentation.py: {error}", file=sys.stderr)
        return 2
    print(arguments.out)
    return 0


@torch.inference_mode()
def draw(runs: list[str], root: str | None, samples: int, out: Path) -> None:
    """Write the figure.

    Raises:
        ValueError: a checkpoint is of no segmentor that train.py trained, or of other classes than the first.
    """
    opened = [open_checkpoint(run) for run in runs]
    for run, each in zip(runs, opened, strict=True):
        if task_of(each.name) is not segmentation or "name" not in each.data:
            raise ValueError(f"{run} is no segmentor that train.py trained")
        if each.class_names != opened[0].class_names:
            raise ValueError(f"{run} knows other classes than {runs[0]}")
    settings = [segmentation.SegmentationData(**each.data) for each in opened]
    settings[0].root = root or settings[0].root
    _, val = segmentation.open_dataset(settings[0])
    colours, names = colours_of(val.class_names), val.class_names
    rows, titles, shown = [], [], set()
    for index in np.unique(np.linspace(0, len(val) - 1, min(samples, len(val))).astype(int)).tolist():
        image, truth = val.read(index)
        picture = np.array(image)
        maps = [truth]
        for each, d in zip(opened, settings, strict=True):
            pixels = normalise(torch.from_numpy(picture)[None], d.mean, d.std)
            maps.append(classify(each.model.eval(), pixels, truth.shape, d.window).numpy())
        rows.append([picture, *(overlay(picture, classes, colours) for classes in maps)])
        titles.append(Path(val.images[index]).name)
        shown |= {i for classes in maps for i in np.unique(classes).tolist() if i < len(names)}
    columns = ["picture", "truth", *(Path(run).name for run in runs)]
    write_sheet(out, rows, titles, columns, names, sorted(shown))


if __name__ == "__main__":
    sys.exit(main())
