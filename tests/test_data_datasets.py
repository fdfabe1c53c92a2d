"""Data sets on disk: layouts, cache, exclusion list, shards, the scripts, and messages for what is wrong."""

import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

import data
from data import folder
from data.datasets import EXCLUDED
from data.folder import list_folder
from scripts import check_dataset, pack_dataset, prepare_imagenet

ROOT = Path(__file__).resolve().parents[1]
WNIDS = ("n01440764", "n01443537", "n02102040")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("INVOLUTION_CACHE", str(path))
    return path


def jpeg(number: int, side: int = 12) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3)).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


def write(
    root: Path, splits: tuple[str, ...] = ("train", "val"), classes: tuple[str, ...] = WNIDS, each: int = 3
) -> Path:
    for split in splits:
        for number, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(each):
                (root / split / name / f"{name}_{i}.JPEG").write_bytes(jpeg(100 * number + i))
    return root


def age(root: Path) -> None:
    """As if nothing had been touched for a minute: only settled folders are cached."""
    then = time.time() - 60
    for path in [root, *root.rglob("*")]:
        os.utime(path, (then, then))


def run(program: Callable[[list[str]], int], *arguments: object) -> int:
    """The script's main; importing torch in a process of its own would take longer than all it does."""
    return program([str(argument) for argument in arguments])


def pixels(images: data.ImageList) -> torch.Tensor:
    loader = data.eval_loader(images, loader="torch", batch_size=len(images), val_resize=8, val_size=8, workers=0)
    return next(iter(loader)).images


def test_demo_is_a_deterministic_stratified_image_folder():
    splits = data.open_dataset("demo")
    assert (len(splits.train), len(splits.val)) == (1442, 355)
    assert splits.train.class_names == tuple("0123456789")
    for images in splits:
        assert np.bincount(images.targets).min() > len(images) / 12
    assert Image.open(splits.val.paths[0]).size == (64, 64)
    assert data.open_dataset("demo").val.fingerprint == splits.val.fingerprint


def _open_demo(cache: str) -> int:
    os.environ["INVOLUTION_CACHE"] = cache
    return len(data.open_dataset("demo").train)


def test_demo_is_written_once_by_many_processes(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert pool.map(_open_demo, [str(tmp_path / "c")] * 3, chunksize=1) == [1442] * 3
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [".digits-64.lock", "digits-64", "lists"]


def test_listing_equals_torchvisions_image_folder(imagenette: Path, edge_cases: Path, tmp_path: Path):
    nested = write(tmp_path) / "train"
    (nested / WNIDS[0] / "b").mkdir()
    for name in ("b/x.png", "b.jpg", "A.jpg", "readme.txt", "é.webp"):
        (nested / WNIDS[0] / name).touch()
    for root in (imagenette / "val", edge_cases / "val", nested):
        images, reference = list_folder(root), ImageFolder(root)
        assert list(zip(images.paths, images.targets.tolist())) == reference.samples
        assert images.class_names == tuple(reference.classes)


def test_cache_is_used_and_refreshed_when_a_folder_changes(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
):
    root = write(tmp_path) / "train"
    list_folder(root)
    assert not list(cache.rglob("*.npz"))  # just written: a change within the clock's tick could go unnoticed
    age(root)
    before = list_folder(root)
    (stored,) = cache.rglob("*.npz")
    with monkeypatch.context() as patch:
        patch.setattr(folder, "_walk", lambda *_: pytest.fail("listed again although nothing changed"))
        assert list_folder(root).fingerprint == before.fingerprint
    (root / WNIDS[1] / "new.jpg").write_bytes(jpeg(7))
    assert len(list_folder(root)) == len(before) + 1
    (root / WNIDS[1] / "new.jpg").unlink()
    age(root)
    stored.write_bytes(stored.read_bytes()[:100])
    assert list_folder(root).fingerprint == before.fingerprint


def test_a_read_only_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    root = write(tmp_path / "data") / "train"
    age(root)
    (tmp_path / "file").touch()
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path / "file"))
    assert len(list_folder(root)) == 9


def test_twenty_thousand_files_stay_small_in_memory(tmp_path: Path):
    """ImageNet's listing at a sixtieth of its size; the whole of it is measured in docs/data.md."""
    source = tmp_path / "empty.JPEG"
    source.touch()
    for number in range(20):
        (tmp_path / "train" / f"n{number:08d}").mkdir(parents=True)
        for i in range(1000):
            os.link(source, tmp_path / "train" / f"n{number:08d}" / f"n{number:08d}_{i}.JPEG")
    images = list_folder(tmp_path / "train")
    assert len(images) == 20000
    assert images.paths.block.nbytes + images.paths.offsets.nbytes + images.targets.nbytes < 60 * len(images)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root), "does not exist; set data.root"),
        (lambda root: shutil.rmtree(root / "val"), "has no folder val; expected"),
        (lambda root: [path.unlink() for path in (root / "train" / WNIDS[2]).iterdir()], "no images .*: n02102040"),
        (lambda root: [shutil.rmtree(path) for path in (root / "train").iterdir()], "has no class folders"),
        (
            lambda root: (root / "val" / WNIDS[0]).rename(root / "val" / "tench"),
            r"1 class\(es\) of val .* not in train: tench\. .*rename them",
        ),
    ],
)
def test_damaged_folders_are_explained(tmp_path: Path, damage, message: str):
    root = write(tmp_path / "data")
    damage(root)
    with pytest.raises(ValueError, match=message):
        data.open_dataset("folder", root)


def test_wrong_names_and_missing_roots_are_explained(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown data set 'imagnet'; expected one of demo, imagenet"):
        data.open_dataset("imagnet", tmp_path)
    with pytest.raises(ValueError, match=r"set data\.root"):
        data.open_dataset("imagenet")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_folders_are_named(tmp_path: Path):
    root = write(tmp_path)
    (root / "train" / WNIDS[0]).chmod(0)
    with pytest.raises(ValueError, match=WNIDS[0]):
        data.open_dataset("folder", root)


def test_cifar_folder_with_a_test_split(tmp_path: Path):
    splits = data.open_dataset("cifar10", write(tmp_path, ("train", "test")))
    assert (len(splits.train), len(splits.val)) == (9, 9)


def test_cifar_download_becomes_a_folder(tmp_path: Path):
    """torchvision's own archive layout, in place as after a download."""
    import pickle

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    rng = np.random.default_rng(0)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name in names:
        entry = {"data": rng.integers(0, 256, (10, 3072)).astype(np.uint8), "labels": list(range(10))}
        (base / name).write_bytes(pickle.dumps(entry))
    labels = [f"class{i}" for i in range(10)]
    (base / CIFAR10.meta["filename"]).write_bytes(pickle.dumps({"label_names": labels}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)  # our bytes, not theirs
        splits = data.open_dataset("cifar10", tmp_path)
    assert (len(splits.train), len(splits.val)) == (50, 10)
    stored = np.asarray(Image.open(splits.val.paths[3]))
    test_entry = pickle.loads((base / "test_batch").read_bytes())
    assert np.array_equal(stored, test_entry["data"][3].reshape(3, 32, 32).transpose(1, 2, 0))


def _flat(root: Path) -> list[str]:
    """Moves the validation images into one folder, as in the official archive; returns their classes in order."""
    classes = []
    for number, path in enumerate(sorted((root / "val").rglob("*.JPEG"), key=lambda path: path.name[::-1])):
        classes.append(path.parent.name)
        path.rename(root / "val" / f"ILSVRC2012_val_{number + 1:08d}.JPEG")
    for name in WNIDS:
        (root / "val" / name).rmdir()
    return classes


def _devkit(folder: Path, classes: list[str]) -> None:
    """The development kit's archive: its numbers follow another order than the sorted names."""
    from scipy.io import savemat

    order = [WNIDS[2], WNIDS[0], WNIDS[1]]
    synsets = np.array([(i + 1, wnid) for i, wnid in enumerate(order)], [("ILSVRC2012_ID", "i4"), ("WNID", "O")])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    truth = "".join(f"{order.index(name) + 1}\n" for name in classes)
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        for name, content in (
            ("meta.mat", meta.getvalue()),
            ("ILSVRC2012_validation_ground_truth.txt", truth.encode()),
        ):
            member = tarfile.TarInfo(f"ILSVRC2012_devkit_t12/data/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("truth", ["names", "numbers", "csv", "devkit"])
def test_flat_validation_folder(tmp_path: Path, truth: str):
    root = write(tmp_path)
    classes = _flat(root)
    with pytest.raises(ValueError, match=r"their classes are missing: put val\.txt"):
        data.open_dataset("imagenet", root)
    files = sorted(path.name for path in (root / "val").iterdir())
    if truth == "devkit":
        _devkit(root, classes)
    elif truth == "csv":
        lines = ["ImageId,PredictionString", *(f"{Path(f).stem},{c} 1 2 3 4" for f, c in zip(files, classes))]
        (root / "LOC_val_solution.csv").write_text("\n".join(lines))
    else:
        shown = classes if truth == "names" else [str(WNIDS.index(name)) for name in classes]
        (root / "val.txt").write_text("".join(f"{f} {c}\n" for f, c in zip(files, shown)))
    val = data.open_dataset("imagenet", root).val
    assert [val.class_names[t] for t in val.targets] == classes
    assert pixels(val).isfinite().all()
    if truth == "names":
        (root / "val.txt").write_text(f"{files[0]} n99999999\n")
        with pytest.raises(ValueError, match="'n99999999', which has no folder"):
            data.open_dataset("imagenet", root)


def test_prepare_imagenet_from_archives_in_the_official_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, archives = write(tmp_path / "source"), tmp_path / "archives"
    archives.mkdir()
    assert run(prepare_imagenet.main, archives, tmp_path / "out") == 2
    assert "lacks ILSVRC2012_img_train.tar" in capsys.readouterr().err
    with tarfile.open(archives / "ILSVRC2012_img_train.tar", "w") as tar:
        for name in WNIDS:
            with tarfile.open(tmp_path / f"{name}.tar", "w") as inner:
                for path in sorted((source / "train" / name).iterdir()):
                    inner.add(path, path.name)
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    expected = data.open_dataset("folder", source)
    train_hash, val_pixels = expected.train.fingerprint, pixels(expected.val)
    classes = _flat(source)
    _devkit(archives, classes)
    with tarfile.open(archives / "ILSVRC2012_img_val.tar", "w") as tar:
        for path in sorted((source / "val").iterdir()):
            tar.add(path, path.name)
    (tmp_path / "out" / "train" / ".n01440764.left-behind").mkdir(parents=True)  # as after an interruption
    for _ in range(2):  # a second run finds everything in place
        assert run(prepare_imagenet.main, archives, tmp_path / "out", "--workers", 2) == 0
    splits = data.open_dataset("imagenet", tmp_path / "out")
    assert splits.train.fingerprint == train_hash
    assert [splits.val.class_names[t] for t in splits.val.targets] == sorted(classes)
    assert torch.equal(pixels(splits.val).sum((1, 2, 3)).sort().values, val_pixels.sum((1, 2, 3)).sort().values)


def test_check_dataset_writes_a_list_that_is_honoured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = write(tmp_path)
    command = [sys.executable, str(ROOT / "scripts" / "check_dataset.py"), str(root)]
    clean = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd="/")
    assert (clean.returncode, clean.stdout.strip()) == (0, "0 of 18 images cannot be read")
    (root / "train" / WNIDS[0] / "new\nline é 'quoted'.jpg").write_bytes(b"no image")
    (root / "val" / WNIDS[1] / f"{WNIDS[1]}_2.JPEG").write_bytes(jpeg(0, 64)[:800])
    (root / "val" / WNIDS[1] / "gone.jpg").symlink_to(root / "nowhere")
    assert run(check_dataset.main, root, "--workers", 2) == 1
    assert "3 of 20 images cannot be read" in capsys.readouterr().out
    assert "truncated" in (root / EXCLUDED).read_text()
    splits = data.open_dataset("folder", root)
    assert (len(splits.train), len(splits.val)) == (9, 8)
    assert pixels(splits.val).isfinite().all()
    assert run(check_dataset.main, tmp_path / "nowhere") == 2
    downloaded = tmp_path / "cache" / "imagenette2-full" / "imagenette2"  # as data=imagenette leaves it
    shutil.copytree(root, downloaded, symlinks=True, ignore=shutil.ignore_patterns(EXCLUDED))
    assert run(check_dataset.main, tmp_path / "cache", "--data", "imagenette", "--workers", 2) == 1
    splits = data.open_dataset("imagenette", tmp_path / "cache")
    assert (len(splits.train), len(splits.val)) == (9, 8)
    (root / EXCLUDED).write_text("".join(f"val/{WNIDS[0]}/{WNIDS[0]}_{i}.JPEG\n" for i in range(3)))
    with pytest.raises(ValueError, match="leaves no images of class n01440764"):
        data.open_dataset("folder", root)
    with pytest.raises(ValueError, match=r"exclusion list .* cannot be read"):
        data.open_dataset("folder", root, exclude=tmp_path / "missing.txt")


@pytest.mark.parametrize(
    "loader",
    [
        "torch",
        pytest.param(
            "dali", marks=pytest.mark.skipif(not data.dali_installed(), reason="NVIDIA DALI is not installed")
        ),
    ],
)
def test_packed_shards_give_the_same_images(tmp_path: Path, loader: str):
    root = write(tmp_path / "folder", each=5)
    assert run(pack_dataset.main, root, tmp_path / "shards", "--shard-size", 0.004) == 0
    assert len(list((tmp_path / "shards").glob("train-*.tar"))) > 2
    folders, shards = data.open_dataset("folder", root), data.open_dataset("folder", tmp_path / "shards")
    assert shards.train.class_names == WNIDS
    key = {images.read(i): int(images.targets[i]) for images in folders for i in range(len(images))}
    assert {shards.val.read(i): int(shards.val.targets[i]) for i in range(15)} == {
        folders.val.read(i): key[folders.val.read(i)] for i in range(15)
    }
    for splits in (folders, shards):
        assert len(splits.train) == 15
    one = data.eval_loader(shards.val, loader=loader, batch_size=15, val_resize=8, val_size=8, workers=0)
    (batch,) = one
    one.close()
    assert (
        batch.images.sum((1, 2, 3)).sort().values - pixels(folders.val).sum((1, 2, 3)).sort().values
    ).abs().max() < 4
    assert run(pack_dataset.main, root, tmp_path / "shards") == 2


def test_shards_of_others_and_damaged_ones(tmp_path: Path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0.tar", "w") as tar:
            for name, content in (("a/x.cls", b"1"), ("a/x.jpg", jpeg(1)), ("a/y.seg.png", b""), ("a/y.cls", b"0")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    splits = data.open_dataset("folder", tmp_path)
    assert splits.train.class_names == ("0", "1")
    assert splits.train.targets.tolist() == [1, 0]
    (tmp_path / "train-1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(ValueError, match=r"train-1\.tar' cannot be read"):
        data.open_dataset("folder", tmp_path)


def test_fingerprint_is_plain_data_and_notices_changes(tmp_path: Path):
    root = write(tmp_path)
    first = data.open_dataset("folder", root).train.fingerprint
    assert json.loads(json.dumps(first)) == first
    assert first["images"] == 9
    assert first["bytes"] == sum(path.stat().st_size for path in (root / "train").rglob("*.JPEG"))
    (root / "train" / WNIDS[0] / f"{WNIDS[0]}_0.JPEG").rename(root / "train" / WNIDS[0] / "other.JPEG")
    assert data.open_dataset("folder", root).train.fingerprint["sha256"] != first["sha256"]
