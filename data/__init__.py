"""Images for training and evaluation: data sets, and two loaders that give the same batches in the same order."""

import dataclasses
import importlib.util
import logging
from collections.abc import Mapping, Sequence

import torch

from data.bands import BY_PILLOW
from data.datasets import DataSplits, open_dataset
from data.decode import MAX_PIXELS, BadImageError, LostDataError
from data.erasing import Erasing
from data.image_list import ImageList
from data.loader import Backend, Batch, EvalLoader, Settings, TrainLoader
from data.mixing import Mixing
from data.policies import Policy
from data.sampling import Plan, eval_batches
from data.torch_loader import Pictures, TorchBackend
from data.transforms import EvalTransform, TrainTransform

__all__ = [
    "BadImageError",
    "Batch",
    "DataSplits",
    "EvalLoader",
    "ImageList",
    "LostDataError",
    "Mixing",
    "TrainLoader",
    "check_bands",
    "dali_installed",
    "eval_loader",
    "open_dataset",
    "train_loader",
]

log = logging.getLogger("involution.data")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def train_loader(
    images: ImageList,
    *,
    batch_size: int,
    global_batch_size: int,
    seed: int,
    train_size: int | Mapping[int, int] = 224,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    policies: Sequence[Policy] = (),
    erasing: float = 0.0,
    mixing: Mixing | None = None,
    repeats: int = 1,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    loader: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 4,
    decoder: str = "cpu",
    max_pixels: int = MAX_PIXELS,
    on_error: str = "stop",
) -> TrainLoader:
    """Endless training batches: random resized crop, horizontal flip, normalisation.

    Args:
        images: the training split.
        batch_size: images of one batch of this rank.
        global_batch_size: images of one optimizer step over all ranks; a multiple of batch_size x world_size.
        seed: with the epoch it decides the order, with epoch and sample the augmentation. The same on all ranks.
        train_size: side of the pictures, or {first epoch: side} for progressive resizing, e.g. {0: 128, 30: 224}.
        scale, ratio: range of a crop's share of the area, and of its width / height.
        flip: probability of mirroring.
        policies: what happens to a picture after that, one after the other (data.policies).
        erasing: probability that a picture loses a box.
        mixing: how batches are mixed.
        repeats: copies of a sample in an epoch, each augmented apart. It has as many steps, of fewer samples.
        mean, std: of the channels, in units of [0, 1]. One value each: the pictures are gray, (b, 1, S, S); C values
            other than 3: the files have C channels, and so have the batches (data.bands).
        loader: "dali" (1 or 3 channels), "torch", or "auto" (dali where it is installed and does; torch for policies on
            a GPU, whose work on the CPU scales with worker processes).
        device: "cuda" pins memory (torch) or puts the images on the GPU (dali).
        workers: worker processes (torch; 0 loads in this process) or threads (dali).
        decoder: dali only: "cpu", or "mixed" to decode on the GPU.
        max_pixels: a larger picture counts as no image.
        on_error: at a file that is no image "stop" with BadImageError, or "skip" it and count it in `.skipped`.

    Raises:
        ValueError: an argument is impossible, or DALI was asked for and is not installed.
    """
    sizes = dict(train_size) if isinstance(train_size, Mapping) else train_size
    numbers = list(sizes.values()) if isinstance(sizes, dict) else [sizes]
    if not numbers or not all(isinstance(number, int) and number >= 1 for number in numbers):
        raise ValueError(f"train_size is {train_size!r}, expected a positive number of pixels or {{epoch: pixels}}")
    if isinstance(sizes, dict) and 0 not in sizes:
        raise ValueError(f"train_size schedule {train_size!r} has no size for epoch 0, e.g. {{0: 128, 30: 224}}")
    if not all(len(pair) == 2 and 0 < pair[0] <= pair[1] for pair in (scale, ratio)):
        raise ValueError(f"scale {scale} and ratio {ratio} must be (low, high) with 0 < low <= high")
    plan = Plan(len(images), batch_size, global_batch_size, rank, world_size, repeats)
    transform = TrainTransform(seed, sizes, (scale[0], scale[1]), (ratio[0], ratio[1]), flip, tuple(policies))
    settings = _settings(images, transform, mean, std, device, workers, decoder, max_pixels)
    settings = dataclasses.replace(settings, erasing=Erasing(seed, erasing) if erasing else None, mixing=mixing)
    return TrainLoader(_backend(loader, settings), settings, plan, seed, on_error)


def eval_loader(
    images: ImageList,
    *,
    batch_size: int,
    val_resize: int = 256,
    val_size: int = 224,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    loader: str = "auto",
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    workers: int = 4,
    decoder: str = "cpu",
    max_pixels: int = MAX_PIXELS,
    on_error: str = "stop",
) -> EvalLoader:
    """Evaluation batches: short side resized to `val_resize`, central crop of `val_size`, as torchvision does it.

    Image p goes to rank p % world_size; every rank gets equally many batches. Other arguments: see `train_loader`.

    Raises:
        ValueError: an argument is impossible, or DALI was asked for and is not installed.
    """
    if not 0 < val_size <= val_resize:
        raise ValueError(f"val_size is {val_size} and val_resize {val_resize}; expected 0 < val_size <= val_resize")
    if batch_size < 1 or not 0 <= rank < world_size or not len(images):
        raise ValueError(f"batch_size {batch_size}, rank {rank} of {world_size} and {len(images)} images do not work")
    transform = EvalTransform(val_resize, val_size)
    settings = _settings(images, transform, mean, std, device, workers, decoder, max_pixels)
    requests = eval_batches(len(images), batch_size, rank, world_size)
    return EvalLoader(_backend(loader, settings), settings, requests, on_error)


def _settings(images, transform, mean, std, device, workers, decoder, max_pixels) -> Settings:  # type: ignore[no-untyped-def]
    if decoder not in ("cpu", "mixed"):
        raise ValueError(f"decoder is {decoder!r}, expected 'cpu' or 'mixed'")
    if len(mean) != len(std) or not mean:
        raise ValueError(f"mean {tuple(mean)} and std {tuple(std)} should both have a value for each channel")
    if workers < 0:
        raise ValueError(f"workers is {workers}, expected 0 or more")
    if max_pixels < 1:
        raise ValueError(f"max_pixels is {max_pixels}, expected 1 or more")
    return Settings(images, transform, tuple(mean), tuple(std), torch.device(device), workers, decoder, max_pixels)


def check_bands(channels: int, loader: str, policies: Sequence[Policy]) -> None:
    """Check that pictures of so many channels can be loaded so.

    Raises:
        ValueError: they cannot.
    """
    if channels in BY_PILLOW:
        return
    if loader == "dali":
        raise ValueError(f"loader 'dali' reads pictures of 1 or 3 channels, not {channels}; use data.loader=torch")
    if policies:
        raise ValueError(
            f"pictures of {channels} channels can be cropped, mirrored, erased and mixed; randaugment, trivialaugment, "
            "three_augment and color_jitter are for colours: leave them out"
        )


def dali_installed() -> bool:
    return importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None


def _backend(loader: str, settings: Settings) -> Backend:
    """The backend by name; DALI is imported only when it is used."""
    if loader not in ("auto", "dali", "torch"):
        raise ValueError(f"loader is {loader!r}, expected 'auto', 'dali' or 'torch'")
    check_bands(len(settings.mean), loader, settings.transform.policies)
    if loader == "dali" and not dali_installed():
        raise ValueError("loader 'dali' needs NVIDIA DALI: pip install nvidia-dali-cuda130, or use data.loader=torch")
    # policies work on the CPU, where worker processes scale better than what DALI leaves to threads of this process
    slower = loader == "auto" and settings.device.type == "cuda" and settings.transform.policies
    if not (loader == "torch" or settings.bands is not None or slower) and dali_installed():
        from data.dali import DaliBackend, unfit_for

        problem = unfit_for(settings.device)
        if problem is None:
            return DaliBackend(settings)
        if loader == "dali":
            raise ValueError(f"loader 'dali' cannot be used here: {problem}, or use data.loader=torch")
        log.warning("data.loader=torch, for %s", problem)
    return TorchBackend(Pictures(settings), settings.workers, settings.device)
