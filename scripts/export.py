"""Export a checkpoint for use elsewhere.

    python scripts/export.py CHECKPOINT OUT --format onnx|torch|aoti|safetensors [--size PIXELS]

onnx         OUT.onnx, for any runtime; images of any batch, and of any size where there is no --size
torch        OUT.pt2, for torch.export.load: no code of this project needed
aoti         OUT.pt2, compiled for CPUs like this one (with --device cuda: this GPU), for C++ (docs/classify.cpp) or
             involution.packages.load; it takes a C++ compiler and about a minute. ATEN_CPU_CAPABILITY=avx2 in the
             environment: for any CPU with AVX2
safetensors  a folder OUT with model.safetensors and a model card
CHECKPOINT: a path or URL: a run's folder, a file of train.py, released, .safetensors.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from involution import export
from involution.loading import open_checkpoint
from involution.models import DENSE

WRITERS: dict[str, Callable[..., None]] = {
    "onnx": export.export_onnx,
    "torch": export.export_torch,
    "aoti": export.export_aoti,
}


def main() -> int:
    """Parse the command line and export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument("--format", choices=(*WRITERS, "safetensors"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of an aoti package")
    parser.add_argument("--size", type=int, metavar="PIXELS", help="a side of the images: for networks that need it")
    arguments = parser.parse_args()
    try:
        if not arguments.out.absolute().parent.is_dir():
            raise ValueError(f"there is no folder {arguments.out.parent} to write to")
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda needs the GPU that the package is for, and torch sees none here")
        model, class_names, data, made_by = open_checkpoint(arguments.checkpoint)
        model.to(torch.device(arguments.device)).eval()
        if arguments.format == "safetensors":
            preparation = export.IMAGENET | data
            export.save_safetensors(model, arguments.out, class_names or (), preparation=preparation, arguments=made_by)
        else:
            preparation = data if made_by["name"] in DENSE else export.IMAGENET | data  # segmentors take any size
            size, own = arguments.size, data.get("val_size") or export.MIN_SIZE
            if size is None and own < export.MIN_SIZE and arguments.format != "onnx":
                size = own
                print(
                    f"for images of {own} pixels a side, as it was trained: programs for any size begin at "
                    f"{export.MIN_SIZE}; --size chooses another", file=sys.stderr,
                )  # fmt: skip
            WRITERS[arguments.format](model, arguments.out, size, class_names or (), preparation)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1 if isinstance(error, RuntimeError) else 2
    print(f"{arguments.checkpoint} -> {arguments.out} ({arguments.format})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
