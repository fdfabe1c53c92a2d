"""Both loaders give the same batches: parity on real photos, resume at any batch, odd files, bad files."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torchvision.transforms import v2

import data
from data import policies, sampling
from data.folder import list_folder
from data.image_list import ImageList
from data.torch_loader import at_most_cores

HAS_DALI = data.dali_installed()
LOADERS = [
    pytest.param("torch"),
    pytest.param("dali", marks=pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")),
]
needs_dali = pytest.mark.skipif(not HAS_DALI, reason="NVIDIA DALI is not installed")
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255,) * 3}  # pixels as they are, 0 ... 255
FILL = (124, 116, 104)
EVERYTHING = {
    "policies": (policies.TimmRandAugment.parse("rand-m9-mstd0.5-inc1", FILL), policies.ColorJitter(0.4, 0.4, 0.4)),
    "erasing": 0.25, "mixing": data.Mixing(1, 0.8, 1.0), "repeats": 3,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageList:
    """The first 101 validation digits."""
    images = data.open_dataset("demo", tmp_path_factory.mktemp("demo") / "digits").val
    return images.select(np.arange(101))


def photos_of(*folders: Path, limit: int = 40) -> ImageList:
    """Every few photos of an image folder."""
    images = list_folder(folders[0])
    return images.select(np.arange(0, len(images), max(1, len(images) // limit)))


def batches(loader: data.TrainLoader | data.EvalLoader, count: int | None = None) -> list[data.Batch]:
    try:
        steps: Iterator[data.Batch] = iter(loader)
        return [next(steps) for _ in range(count)] if count is not None else list(steps)
    finally:
        loader.close()


def rows(found: list[data.Batch]) -> tuple[torch.Tensor, list[int]]:
    """The rows that count."""
    images = torch.cat([batch.images[: batch.valid] for batch in found])
    return images, [int(t) for batch in found for t in batch.targets[: batch.valid]]


def evaluate(images: ImageList, loader: str, **options) -> tuple[torch.Tensor, list[int]]:
    settings = {"batch_size": 8, "workers": 0} | PLAIN | options
    return rows(batches(data.eval_loader(images, loader=loader, **settings)))


def reference(images: ImageList, resize: int, size: int) -> torch.Tensor:
    transform = v2.Compose([v2.Resize(resize), v2.CenterCrop(size), v2.PILToTensor()])
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in images.paths]).float()


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(("resize", "size"), [(256, 224), (73, 64), (64, 64), (96, 95)])
@pytest.mark.parametrize("source", ["imagenette", "edge_cases", "photos"])
def test_evaluation_equals_torchvision(loader: str, resize: int, size: int, source: str, request, tmp_path: Path):
    root = request.getfixturevalue(source)
    if source == "photos":  # COCO's flat folder as one class
        (tmp_path / "coco").symlink_to(root / "val2017")
        root = tmp_path
    images = photos_of(root if source == "photos" else root / "val", limit=12)
    found, targets = evaluate(images, loader, val_resize=resize, val_size=size)
    assert targets == images.targets.tolist()
    assert torch.equal(found, reference(images, resize, size))


@needs_dali
@pytest.mark.parametrize("augmentation", [{}, EVERYTHING], ids=["plain", "everything"])
def test_training_pictures_agree_between_loaders(augmentation: dict, imagenette: Path):
    images = photos_of(imagenette / "train")
    options = {"batch_size": 8, "global_batch_size": 16, "seed": 5, "train_size": 64, "workers": 0} | PLAIN
    options |= augmentation
    torch_ones, dali_ones = (
        batches(data.train_loader(images, loader=name, **options), 12) for name in ("torch", "dali")
    )
    for one, other in zip(torch_ones, dali_ones, strict=True):
        assert one.valid == other.valid
        assert torch.equal(one.targets, other.targets)
        assert torch.equal(one.images, other.images)
        assert one.share == other.share
        assert (one.partners is None) == (other.partners is None) == (not augmentation)


@needs_dali
@pytest.mark.parametrize("training", [False, True])
def test_pictures_that_dali_resizes_as_on_a_gpu(training: bool, imagenette: Path):
    from data.dali import DaliBackend

    images = photos_of(imagenette / "train", limit=24)
    options = {"loader": "torch", "batch_size": 8, "workers": 0} | PLAIN
    if training:
        one = data.train_loader(images, global_batch_size=8, seed=5, train_size=64, **options)
        other = data.TrainLoader(DaliBackend(one.settings, resize=True), one.settings, one.plan, one.seed, "stop")
    else:
        one = data.eval_loader(images, val_resize=73, val_size=64, **options)
        other = data.EvalLoader(DaliBackend(one.settings, resize=True), one.settings, one.requests, "stop")
    gap = (rows(batches(other, 3))[0] - rows(batches(one, 3))[0]).abs()
    assert gap[:, :, 1:-1, 1:-1].max() <= (2.01 if training else 1.01)
    assert gap.mean() < 0.5  # the outermost pixels of random windows: see TrainTransform.same_in_dali


@pytest.mark.parametrize("loader", LOADERS)
def test_training_is_torchvisions_crop_and_flip(loader: str, imagenette: Path):
    images = photos_of(imagenette / "train", limit=8)
    loaded = batches(
        data.train_loader(
            images, loader=loader, batch_size=4, global_batch_size=4, seed=2, train_size=48, workers=0, **PLAIN
        ),
        2,
    )
    order = sampling.permutation(2, 0, len(images))[:8]
    pictures, _ = rows(loaded)
    for picture, index, draw in zip(pictures, order, sampling.draws(2, 0, order).tolist()):
        photo = v2.functional.pil_to_tensor(Image.open(images.paths[index]).convert("RGB"))
        top, left, height, width = sampling.crop_window(draw, *photo.shape[1:], (0.08, 1), (3 / 4, 4 / 3))
        expected = v2.functional.resized_crop(v2.functional.to_pil_image(photo), top, left, height, width, [48, 48])
        expected = v2.functional.pil_to_tensor(expected).float()
        expected = expected.flip(-1) if draw[-1] < 0.5 else expected
        gap = (picture - expected).abs()
        assert gap.max() <= 1
        assert (gap > 0).float().mean() < 0.01  # torch rounds Pillow's filter to 16 bits


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("world", [1, 3])
def test_every_image_once_over_the_ranks(loader: str, world: int, digits: ImageList):
    found: list[torch.Tensor] = []
    for rank in range(world):
        one = data.train_loader(
            digits, loader=loader, batch_size=5, global_batch_size=10 * world, seed=1, rank=rank, world_size=world,
            train_size=32, scale=(1, 1), ratio=(1, 1), flip=0.0, workers=0, **PLAIN,
        )  # fmt: skip
        found.append(rows(batches(one, one.plan.batches_per_epoch))[0])
    both = torch.cat(found).sum((1, 2, 3)).sort().values
    expected = batches(
        data.train_loader(
            digits,
            loader="torch",
            batch_size=101,
            global_batch_size=101,
            seed=0,
            train_size=32,
            scale=(1, 1),
            ratio=(1, 1),
            flip=0.0,
            workers=0,
            **PLAIN,
        ),
        1,
    )
    sums = expected[0].images.sum((1, 2, 3)).sort().values
    assert len(both) == 101
    assert torch.equal(both, sums)


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_at_any_batch_is_bit_equal(loader: str, workers: int, digits: ImageList):
    def make() -> data.TrainLoader:
        return data.train_loader(
            digits, loader=loader, batch_size=8, global_batch_size=32, seed=1, train_size=24, workers=workers
        )

    first = make()
    per_epoch = first.plan.batches_per_epoch  # 13: three steps of four batches and a ragged one of one
    states, whole = [], []
    for batch in first:
        whole.append(batch)
        states.append(first.state_dict())
        if len(whole) == 2 * per_epoch + 3:
            break
    assert states[per_epoch - 1] == {"epoch": 1, "batch": 0}
    assert not torch.equal(whole[0].images, whole[per_epoch].images)
    first.seek(2)  # back: what was prefetched is dropped
    assert torch.equal(next(first).images, whole[8].images)
    first.close()
    for after in (1, 6, per_epoch - 1, per_epoch, per_epoch + 2) if workers == 0 else (5,):
        resumed = make()
        resumed.load_state_dict(states[after - 1])
        for expected, found in zip(whole[after : after + 3], batches(resumed, 3), strict=True):
            assert torch.equal(expected.images, found.images)
            assert torch.equal(expected.targets, found.targets)
            assert expected.valid == found.valid


@pytest.mark.parametrize("loader", LOADERS)
def test_state_does_not_depend_on_the_number_of_ranks(loader: str, digits: ImageList):
    """Global step 3 has the same samples and crops on one rank and on two."""
    images = []
    for world in (1, 2):
        for rank in range(world):
            one = data.train_loader(
                digits,
                loader=loader,
                batch_size=8,
                global_batch_size=32,
                seed=1,
                rank=rank,
                world_size=world,
                train_size=24,
                workers=0,
                **EVERYTHING,
            )
            one.seek(2)
            images.append(rows(batches(one, one.micro_batches(2)))[0])
    merged = torch.cat([images[1][:8], images[2][:8], images[1][8:], images[2][8:]])
    assert torch.equal(images[0], merged)


@pytest.mark.parametrize("loader", LOADERS)
def test_shapes_memory_format_and_types(loader: str, digits: ImageList):
    found = batches(data.eval_loader(digits, loader=loader, batch_size=40, val_resize=40, val_size=32, workers=0))
    assert [batch.valid for batch in found] == [40, 40, 21]
    for batch in found:
        assert batch.images.shape == (40, 3, 32, 32)
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert (batch.images.dtype, batch.targets.dtype) == (torch.float32, torch.int64)
        assert batch.targets.shape == (40,)


@pytest.mark.parametrize("loader", LOADERS)
def test_progressive_sizes(loader: str, digits: ImageList):
    one = data.train_loader(
        digits, loader=loader, batch_size=51, global_batch_size=51, seed=0, train_size={0: 16, 2: 32}, workers=0
    )
    assert [batch.images.shape[-1] for batch in batches(one, 6)] == [16, 16, 16, 16, 32, 32]


@pytest.mark.parametrize("loader", LOADERS)
def test_evaluation_can_be_repeated_and_left(loader: str, digits: ImageList):
    one = data.eval_loader(digits, loader=loader, batch_size=16, val_resize=32, val_size=32, workers=1)
    first = list(one)
    next(iter(one))  # left in the middle
    second = batches(one)
    assert len(first) == len(second) == len(one) == 7
    assert all(torch.equal(a.images, b.images) for a, b in zip(first, second))


def test_global_random_state_is_left_alone(digits: ImageList):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    batches(
        data.train_loader(digits, loader="torch", batch_size=8, global_batch_size=8, seed=1, train_size=8, workers=1), 2
    )
    assert torch.equal(torch.rand(3), expected)


def write_odd_files(folder: Path, photo: Path) -> None:
    """Everything that people have found in image folders and that Pillow can read."""
    folder.mkdir(parents=True)
    image = Image.open(photo).convert("RGB")
    small = image.resize((83, 57))
    rotated = Image.Exif()
    rotated[0x0112] = 6
    small.convert("CMYK").save(folder / "cmyk.jpg")
    small.convert("L").save(folder / "grey with blanks (1).jpg")
    small.save(folder / 'quote\'s "ü" 鳥.JPEG', progressive=True)
    small.save(folder / "exif.jpg", exif=rotated)
    small.save(folder / "really-a-png.JPEG", format="PNG")
    small.save(folder / "really-a-gif.JPEG", format="GIF")
    small.convert("P").save(folder / "palette.png")
    small.convert("RGBA").save(folder / "alpha.png")
    small.convert("LA").save(folder / "grey-alpha.png")
    Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257).save(folder / "sixteen-bits.png")
    small.convert("1").save(folder / "one-bit.png")
    small.save(folder / "web.webp")
    image.resize((1, 1)).save(folder / "one-pixel.jpg")
    image.resize((20000, 2)).save(folder / "wide.jpg")
    image.resize((2, 20000)).save(folder / "tall.png")
    (folder / "trailing.jpg").write_bytes((folder / "exif.jpg").read_bytes() + bytes(100))
    (folder / "link.jpg").symlink_to(folder / "exif.jpg")


@pytest.mark.parametrize("loader", LOADERS)
def test_odd_files_load_as_pillow_decodes_them(loader: str, photos: Path, tmp_path: Path):
    write_odd_files(tmp_path / "class", next((photos / "val2017").iterdir()))
    images = list_folder(tmp_path)
    assert len(images) == 17
    found, _ = evaluate(images, loader, val_resize=40, val_size=32)
    ordinary = [i for i, path in enumerate(images.paths) if Path(path).stem not in ("wide", "tall")]
    expected = reference(images.select(np.array(ordinary)), 40, 32)
    assert (found[ordinary] - expected).abs().max() <= 1.01
    assert found.isfinite().all()
    one = data.train_loader(
        images, loader=loader, batch_size=17, global_batch_size=17, seed=0, train_size=32, workers=0, **PLAIN
    )
    assert batches(one, 2)[1].valid == 17


def write_bad_files(folder: Path, photo: Path) -> dict[str, str]:
    """Files that are no images; name -> part of the reason."""
    whole = photo.read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "cut-and-closed.jpg").write_bytes(whole[: len(whole) // 2] + b"\xff\xd9")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404</html>")
    (folder / "dangling.jpg").symlink_to(folder / "nowhere.jpg")
    scan = whole.index(b"\xff\xda")
    (folder / "header-only.jpg").write_bytes(whole[:scan] + b"\xff\xd9")  # looks whole until it is decoded
    (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40) + b"IEND")
    return {
        "truncated.jpg": "truncated", "empty.jpg": "empty", "text.jpg": "identify", "dangling.jpg": "No such file",
        "bad.png": "", "header-only.jpg": "", "cut-and-closed.jpg": "",
    }  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS)
def test_bad_files_are_named_or_skipped(loader: str, photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    folder = tmp_path / "class"
    folder.mkdir()
    good = sorted((photos / "val2017").iterdir())[:9]
    for photo in good:
        (folder / photo.name).symlink_to(photo)
    bad = write_bad_files(folder, good[0])
    images = list_folder(tmp_path)
    for name, reason in bad.items():
        only = images.select(np.array([i for i, path in enumerate(images.paths) if path.endswith(name)]))
        if _pillow_reads(Path(only.paths[0])):
            continue  # damage that leaves a decodable file: both loaders train on it as Pillow would
        with pytest.raises(data.BadImageError, match="check_dataset") as error:
            evaluate(only, loader)
        assert error.value.path == only.paths[0]
        assert reason in error.value.reason
    one = data.train_loader(
        images, loader=loader, batch_size=4, global_batch_size=4, seed=0, train_size=16, workers=0, on_error="skip"
    )
    found = batches(one, 2 * one.plan.batches_per_epoch)
    unreadable = {str(folder / name) for name in bad if not _pillow_reads(folder / name)}
    assert set(one.skipped) == unreadable
    assert len(caplog.messages) == len(unreadable)  # once a file, not once an epoch
    assert sum(batch.valid for batch in found) == 2 * (len(images) - len(unreadable))
    assert all(batch.images.shape == (4, 3, 16, 16) for batch in found)


def _pillow_reads(path: Path) -> bool:
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        Image.open(path).convert("RGB")
    except Exception:
        return False
    return True


@pytest.mark.parametrize("loader", LOADERS)
def test_a_split_without_a_readable_image_keeps_its_shape(loader: str, tmp_path: Path):
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "empty.jpg").touch()
    images = list_folder(tmp_path)
    one = data.eval_loader(images, loader=loader, batch_size=3, val_resize=8, val_size=8, workers=0, on_error="skip")
    (batch,) = batches(one)
    assert batch.valid == 0
    assert batch.images.shape == (3, 3, 8, 8)


def test_impossible_arguments(digits: ImageList):
    sizes = {"batch_size": 8, "global_batch_size": 8, "seed": 0}
    for options, message in [
        ({"loader": "ffcv"}, "loader is 'ffcv', expected"),
        ({"train_size": 0}, "train_size is 0"),
        ({"train_size": {5: 32}}, "no size for epoch 0"),
        ({"workers": -1}, "workers is -1"),
        ({"decoder": "gpu"}, "decoder is 'gpu'"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"scale": (1, 0.5)}, "scale"),
        ({"batch_size": 3}, "not a multiple"),
    ]:
        with pytest.raises(ValueError, match=message):
            data.train_loader(digits, **(sizes | options))
    with pytest.raises(ValueError, match="val_size is 224 and val_resize 200"):
        data.eval_loader(digits, batch_size=8, val_resize=200)


def test_without_dali_auto_is_torch_and_dali_says_how_to_get_it(digits: ImageList, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data, "dali_installed", lambda: False)
    with pytest.raises(ValueError, match="pip install nvidia-dali-cuda130"):
        data.eval_loader(digits, batch_size=8, val_resize=32, val_size=32, loader="dali")
    assert batches(data.eval_loader(digits, batch_size=101, val_resize=32, val_size=32, workers=0))[0].valid == 101


def test_no_process_or_thread_survives_close(digits: ImageList):
    one = data.train_loader(digits, loader="torch", batch_size=8, global_batch_size=8, seed=1, train_size=8, workers=2)
    next(one)
    workers = [worker.pid for worker in one.backend._loader._iterator._workers]
    one.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in workers)


def test_no_more_workers_than_cores(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    with caplog.at_level("INFO", "involution.data"):
        assert [at_most_cores(n) for n in (0, 3, 40, 40)] == [0, 3, 3, 3]
    assert caplog.text.count("data.workers=40") == 1
