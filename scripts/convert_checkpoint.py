"""Convert weights between the released checkpoints' names and ours.

    python scripts/convert_checkpoint.py IN OUT [--to ours|released]

IN: a released checkpoint (also of a detector or segmentor), one of train.py, a plain state dict or a .safetensors file.
OUT: .safetensors, or a torch file with the tensors under "state_dict". Every tensor is copied as it is, but for the
order of a detector's classes (weights/dense.py). The model is read off the file; missing and unexpected tensors are
listed, and are an error.
"""

import argparse
import sys
from pathlib import Path

import torch

from involution.loading import IMAGENET
from involution.models import DENSE, create_model, tensors_for, without_weights
from involution.weights import dense, files, load_into, open_weights, to_released


def convert(source: Path, target: Path, to: str = "ours") -> str:
    """Convert ``source`` into ``target``; returns a line about what it is.

    Raises:
        ValueError: ``source`` holds no weights of ours, or ``target`` cannot be written there.
    """
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write to")
    weights = open_weights(source)
    options = without_weights(weights.describe())
    name = options.pop("name")
    involved = name in DENSE or (name.startswith("rednet") and options.get("stem", "involution") == "involution")
    if to == "released" and not involved:
        raise ValueError(f"{source} is a {name} that was never released: only RedNets with the involution stem were")
    with torch.device("meta"):
        model = create_model(name, **options)
    state = tensors_for(model, name, weights)
    load_into(model, {key: value.to("meta") for key, value in state.items()})
    rename = dense.to_released if name in DENSE else to_released
    converted = rename(state) if to == "released" else state
    converted = {key: value.contiguous() for key, value in converted.items()}
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        preparation = {key: weights.data[key] for key in IMAGENET if key in weights.data}
        notes = files.metadata({"name": name} | options, weights.class_names, preparation)
        save_file(converted, target, metadata=notes if to == "ours" else {"format": "pt"})
    else:
        torch.save({"state_dict": converted}, target)
    return f"{name} ({', '.join(f'{k}={v}' for k, v in options.items())}), {len(converted)} tensors -> {target}"


def main() -> int:
    """Parse the command line and convert."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", type=Path)
    parser.add_argument("target", metavar="OUT", type=Path)
    parser.add_argument("--to", choices=("ours", "released"), default="ours", help="whose names OUT has")
    arguments = parser.parse_args()
    try:
        print(convert(arguments.source, arguments.target, arguments.to))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
