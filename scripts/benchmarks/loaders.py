"""The loaders that benchmarks compare: ours, plain or with more augmentation, and their peers."""

import argparse
import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import data
from data.policies import RandAugment

STRONG = ", RandAugment + erasing + mixup"
Source = tuple[Iterator[Any], Callable[[], None]]  # batches without end, and how to stop


def our_loader(
    root: str, loader: str, batch: int, side: int, workers: int, device: str, strong: bool = False
) -> Source:
    """With the augmentation of recipe=paper; `strong`: and with more."""
    images = data.open_dataset("folder", root).train
    more: Any = {"policies": [RandAugment()], "erasing": 0.25, "mixing": data.Mixing(0, 0.8, 0)} if strong else {}
    made = data.train_loader(
        images, batch_size=batch, global_batch_size=batch, seed=0, train_size=side, loader=loader, workers=workers,
        device=device, decoder="mixed" if device == "cuda" else "cpu", **more,
    )  # fmt: skip
    return iter(made), made.close


def torchvision_loader(root: str, batch: int, side: int, workers: int, device: str) -> Source:
    """A well-set DataLoader: Pillow, persistent workers, four batches ahead, normalised in the worker."""
    from torch.utils.data import DataLoader, RandomSampler
    from torchvision import datasets, transforms

    steps = [
        transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(data.IMAGENET_MEAN, data.IMAGENET_STD),
    ]  # fmt: skip
    images = datasets.ImageFolder(str(Path(root) / "train"), transforms.Compose(steps))
    loader = DataLoader(
        images, batch, sampler=RandomSampler(images, num_samples=batch * 10**4), num_workers=workers,
        prefetch_factor=4 if workers else None, pin_memory=device == "cuda", drop_last=True,
    )  # fmt: skip
    gc.freeze()  # a worker must not run the destructors of the parent's DALI pipelines
    iterator: Any = iter(loader)
    gc.unfreeze()

    def close() -> None:
        if workers:
            iterator._shutdown_workers()

    return iterator, close


def bare_dali(root: str, batch: int, side: int, workers: int, device: str) -> Source:
    """DALI's own reader with its own random crop: no order of ours, no exact resume, no Pillow parity."""
    from nvidia.dali import fn, pipeline_def
    from nvidia.dali.types import DALIDataType, DALIImageType

    mixed = device == "cuda"

    options: Any = {"device_id": 0 if mixed else None, "num_threads": max(1, workers), "prefetch_queue_depth": 4}

    @pipeline_def(batch_size=batch, **options)
    def pipeline() -> Any:
        pixels: Any
        encoded, targets = fn.readers.file(file_root=str(Path(root) / "train"), random_shuffle=True, name="reader")
        pixels = fn.decoders.image_random_crop(
            encoded, device="mixed" if mixed else "cpu", output_type=DALIImageType.RGB, random_area=[0.08, 1.0]
        )
        pixels = fn.resize(pixels, size=[side, side], antialias=True)
        return fn.crop_mirror_normalize(
            pixels, mirror=fn.random.coin_flip(), output_layout="HWC", dtype=DALIDataType.FLOAT,
            mean=[255 * v for v in data.IMAGENET_MEAN], std=[255 * v for v in data.IMAGENET_STD],
        ), targets  # fmt: skip

    pipe: Any = pipeline()
    pipe.build()

    def batches() -> Iterator[Any]:
        while True:
            pixels, _ = pipe.run()
            yield torch.from_dlpack(pixels.as_tensor()).permute(0, 3, 1, 2)

    return batches(), lambda: None


def sources(root: str, args: argparse.Namespace) -> dict[str, Callable[[], Source]]:
    """Every loader that can run here, or those of one `data.loader`."""
    rest = (args.batch, args.side, args.workers, args.device)
    try:
        import nvidia.dali  # noqa: F401
    except ImportError:
        dali: dict[str, Callable[[], Source]] = {}
    else:
        dali = {
            "data.loader=dali": lambda: our_loader(root, "dali", *rest),
            f"data.loader=dali{STRONG}": lambda: our_loader(root, "dali", *rest, strong=True),
            "DALI readers.file (peer)": lambda: bare_dali(root, *rest),
        }
    torch_ = {
        "data.loader=torch": lambda: our_loader(root, "torch", *rest),
        f"data.loader=torch{STRONG}": lambda: our_loader(root, "torch", *rest, strong=True),
        "torchvision DataLoader (peer)": lambda: torchvision_loader(root, *rest),
    }
    return {"dali": dali, "torch": torch_}.get(args.loader, dali | torch_)
