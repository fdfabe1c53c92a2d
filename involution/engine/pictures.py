"""Pictures of the user's own: which they are, what is in a file, and the model that is to look at them."""

import glob
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import nn

from data.bands import BY_PILLOW, decode_bands
from data.decode import BadImageError, check_pixels
from data.folder import EXTENSIONS
from involution.engine.config import EvalConfig
from involution.engine.errors import UserError
from involution.folding import fold_parts
from involution.pictures import to_rgb


def for_pictures(model: nn.Module, config: EvalConfig, device: torch.device) -> nn.Module:
    """A model ready to look at pictures: folded on a CPU, unless `config` wants the last digits of evaluations."""
    model = model.to(device).to(memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    return fold_parts(model) if config.fold and device.type == "cpu" else model


def find_images(images: str | list[str]) -> list[Path]:
    """The picture files among paths of files and folders (searched to the bottom), in the order given, then by name;
    patterns (photos/*.jpg) stand for what matches.

    Raises:
        UserError: a path does not exist, or a folder has no pictures.
    """
    paths: list[Path] = []
    for path in _matched([images] if isinstance(images, str) else images):
        if not path.exists():
            raise UserError(f"images: there is no file or folder {path}")
        if not path.is_dir() and not path.is_file():
            raise UserError(f"images: {path} is a pipe or a device, no file")
        paths += _inside(path) if path.is_dir() else [path]
    if not paths:
        raise UserError("images is an empty list; give a file, a folder, or [a.jpg,b.jpg]")
    return paths


def _matched(names: Sequence[str]) -> Iterator[Path]:
    """The paths that names stand for, in which * ? and [] may match several, ** any folders."""
    for name in map(str, names):
        path = Path(name).expanduser()
        matches = [] if path.exists() else sorted(glob.glob(str(path), recursive=True))
        if not matches and glob.has_magic(name) and not path.exists():
            raise UserError(f"images: nothing matches {name}")
        yield from [Path(match) for match in matches] or [path]


def _inside(folder: Path) -> list[Path]:
    endings = tuple(ending.decode() for ending in EXTENSIONS)
    found = sorted(path for path in folder.rglob("*") if path.name.lower().endswith(endings) and path.is_file())
    if not found:
        raise UserError(f"images: the folder {folder} has no pictures ({' '.join(endings)})")
    return found


def open_picture(path: Path, channels: int = 3, scaled: bool = False) -> Any:
    """The picture in a file, in RGB. Unlike in data sets, cameras' note which side is up is obeyed.

    scaled: more than 8 bits are, as where there are boxes or masks; a classifier's pictures are cut off.

    For a model of other than 1 or 3 `channels`: its bands (C, H, W) in [0, 1].

    Raises:
        UserError: it cannot be read as a picture.
    """
    try:
        if channels not in BY_PILLOW:
            return decode_bands(path.read_bytes(), str(path), channels).permute(2, 0, 1) / 255
        with Image.open(path) as image:
            check_pixels(image.width, image.height)
            upright = ImageOps.exif_transpose(image)
            return to_rgb(upright) if scaled else upright.convert("RGB")
    except BadImageError as error:
        reason = error.reason
    except UnidentifiedImageError:
        reason = "Pillow cannot identify it as an image"
    except Exception as error:  # Pillow's plugins raise almost every type
        reason = str(error) or type(error).__name__
    raise UserError(f"images: {path} cannot be read as a picture: {reason}; data.on_error=skip leaves such files out")
