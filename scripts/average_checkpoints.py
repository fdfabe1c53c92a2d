"""Average the weights of several checkpoints of one model.

    python scripts/average_checkpoints.py OUT CHECKPOINT CHECKPOINT ...

CHECKPOINT: whatever eval.py takes: a run's step-*.pt (train.keep_checkpoints=N keeps the last N), runs' folders, files.
OUT: a file for eval.py, involution.load and checkpoint=. Weights and BatchNorm statistics are averaged in float64;
counts, names of classes and preparation of pictures are the last checkpoint's. Where a run kept an average of its own
(train.ema_decay), that is taken.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from involution.weights import Weights, open_weights, run_file


def average(several: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of the tensors of several state dicts; integers are those of the last.

    Raises:
        ValueError: they are not of one model.
    """
    *others, last = several
    for other in others:
        if other.keys() != last.keys() or any(other[key].shape != last[key].shape for key in last):
            differ = sorted(other.keys() ^ last.keys()) or [key for key in last if other[key].shape != last[key].shape]
            raise ValueError(f"the checkpoints are of different models: {', '.join(differ[:5])} differ")
    return {
        key: torch.stack([each[key].double() for each in several]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for key, value in last.items()
    }


def save(path: Path, tensors: dict[str, Tensor], like: Weights) -> None:
    """Write the tensors with what the checkpoint ``like`` tells besides."""
    if like.model is None:
        torch.save({"state_dict": tensors}, path)
    else:
        config = {"model": like.model, "data": like.data}
        run_file.write(path, {"model": tensors, "ema": None, "config": config, "class_names": like.class_names})


def main() -> int:
    """Parse the command line and average."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("checkpoints", metavar="CHECKPOINT", nargs="+")
    arguments = parser.parse_args()
    try:
        if not arguments.out.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {arguments.out.parent} to write to")
        if len(arguments.checkpoints) < 2:
            raise ValueError("an average takes two checkpoints or more")
        opened = [open_weights(each) for each in arguments.checkpoints]
        save(arguments.out, average([each.tensors for each in opened]), opened[-1])
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{len(opened)} checkpoints -> {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
