"""Convert weights between the released checkpoints' names and ours.

    python scripts/convert_checkpoint.py IN OUT [--to ours|released]

IN: a released checkpoint (also of a detector or segmentor: its backbone is taken), one of train.py, a plain state dict
or a .safetensors file. OUT: .safetensors, or a torch file with the tensors under "state_dict". Every tensor is copied
as it is. The model is read off the tensors' shapes; missing and unexpected tensors are listed, and are an error.
"""

import argparse
import sys
from pathlib import Path

import torch

from involution.models import create_model
from involution.weights import describe, load_into, read, to_ours, to_released


def convert(source: Path, target: Path, to: str = "ours") -> str:
    """Convert ``source`` into ``target``; returns a line about what it is.

    Raises:
        ValueError: ``source`` holds no weights of ours, or ``target`` cannot be written there.
    """
    if not target.parent.is_dir():
        raise ValueError(f"there is no folder {target.parent} to write to")
    state = to_ours(read(source))
    name, options = describe(state)
    if to == "released" and not (name.startswith("rednet") and options["stem"] == "involution"):
        raise ValueError(f"{source} is a {name} that was never released: only RedNets with the involution stem were")
    with torch.device("meta"):
        model = create_model(name, **options)
    load_into(model, {key: value.to("meta") for key, value in state.items()})
    converted = to_released(state) if to == "released" else state
    converted = {key: value.contiguous() for key, value in converted.items()}
    if target.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file(converted, target)
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
