"""Released checkpoints <-> ours, files, downloads and what is refused."""

import hashlib
import os
import runpy
from pathlib import Path

import pytest
import torch
import torchvision
from models_common import fitted
from programs import in_process
from torch import Tensor, nn

import involution
from involution import involution2d, weights
from involution.models import load_model

ROOT = Path(__file__).resolve().parents[1]


class ConvModule(nn.Module):
    """OpenMMLab's: convolution, BatchNorm, ReLU under these names."""

    def __init__(self, *args, norm: bool = True, **options) -> None:
        super().__init__()
        self.conv = nn.Conv2d(*args, bias=not norm, **options)
        if norm:
            self.bn = nn.BatchNorm2d(args[1])
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu() if self.norm else self.conv(x)


class ReleasedInvolution(nn.Module):
    def __init__(self, channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.groups = kernel_size, stride, channels // 16
        self.conv1 = ConvModule(channels, channels // 4, 1)
        self.conv2 = ConvModule(channels // 4, kernel_size**2 * self.groups, 1, norm=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.avg_pool2d(x, self.stride)
        kernel = self.conv2(self.conv1(pooled)).unflatten(1, (self.groups, self.kernel_size, self.kernel_size))
        return involution2d(x, kernel, stride=self.stride)


class ReleasedBottleneck(nn.Module):
    def __init__(self, in_channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(in_channels, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = ReleasedInvolution(width, 7, stride), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        if in_channels != 4 * width:
            down = nn.Conv2d(in_channels, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        return (self.bn3(self.conv3(y)) + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ReleasedRedNet26(nn.Module):
    """The released network's modules as its checkpoints name them."""

    def __init__(self, stem_kernel_size: int = 3) -> None:
        super().__init__()
        self.backbone, self.head = nn.Module(), nn.Module()
        self.backbone.stem = nn.Sequential(
            ConvModule(3, 32, 3, stride=2, padding=1),
            ReleasedInvolution(32, stem_kernel_size, 1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            ConvModule(32, 64, 3, padding=1),
        )
        in_channels = 64
        for i, (width, depth) in enumerate(zip((64, 128, 256, 512), (1, 2, 4, 1), strict=True)):
            blocks = nn.Sequential()
            for j in range(depth):
                blocks.append(ReleasedBottleneck(in_channels, width, 2 if i and not j else 1))
                in_channels = 4 * width
            self.backbone.add_module(f"layer{i + 1}", blocks)
        self.head.fc = nn.Linear(2048, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.backbone.stem(x), 3, 2, 1)
        for i in range(4):
            x = getattr(self.backbone, f"layer{i + 1}")(x)
        return self.head.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def released() -> nn.Module:
    torch.manual_seed(0)
    return fitted(ReleasedRedNet26().double())


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def test_a_released_checkpoint_becomes_our_model(released, tmp_path):
    torch.save({"meta": {"epoch": 120}, "state_dict": released.state_dict()}, tmp_path / "released.pth")
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    model = involution.create_model("rednet26").double().eval()
    weights.load_into(model, weights.to_ours(weights.read(tmp_path / "released.pth")))
    with torch.no_grad():
        torch.testing.assert_close(model(images), released(images))
    single = involution.create_model("rednet26", pretrained=tmp_path / "released.pth")
    assert torch.equal(single.fc.weight, released.head.fc.weight.float())


def test_the_script_converts_there_and_back(released, tmp_path):
    """From a file that is the weights alone, to one of safetensors, to one of torch."""
    script = runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"))
    state = released.state_dict()
    torch.save(state, tmp_path / "in.pth")
    told = script["convert"](tmp_path / "in.pth", tmp_path / "ours.safetensors")
    assert "rednet26 (num_classes=1000, in_chans=3, stem=involution, kernel_generation=bottleneck" in told
    ours = weights.read(tmp_path / "ours.safetensors")
    assert ours.keys() == involution.create_model("rednet26").state_dict().keys()
    script["convert"](tmp_path / "ours.safetensors", tmp_path / "back.pth", "released")
    assert same(weights.read(tmp_path / "back.pth"), state)


def test_the_script_answers_wrong_input_with_one_message(tmp_path):
    done = in_process("scripts/convert_checkpoint.py", str(tmp_path / "none.pth"), str(tmp_path / "out.pth"))
    assert done.status == 2
    assert done.stderr.startswith(f"error: there is no file {tmp_path / 'none.pth'}")
    assert done.stderr.count("\n") == 1


def test_a_detectors_backbone_is_taken(tmp_path, caplog):
    state = {k: v for k, v in ReleasedRedNet26(stem_kernel_size=7).state_dict().items() if k.startswith("backbone.")}
    state |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "rpn_head.rpn_conv.weight": torch.zeros(1)}
    torch.save({"state_dict": state}, tmp_path / "detector.pth")
    model = load_model(tmp_path / "detector.pth")
    assert "neck.lateral_convs.0.conv.weight, rpn_head.rpn_conv.weight" in caplog.text
    assert model.num_classes == 0
    assert model.stem.conv2.kernel_size == 7
    taken = {k: v for k, v in state.items() if k.startswith("backbone.")}
    assert same(weights.to_released(model.state_dict()), taken)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel_size": 5, "group_channels": 4, "stem_kernel_size": 7, "num_classes": 3},
        {"group_channels": None, "kernel_size": 9, "reduction_ratio": 1},
        {"group_channels": 1, "kernel_size": 3, "reduction_ratio": 16, "in_chans": 1, "num_classes": 0},
        {"stem": "convolution", "kernel_generation": "linear"},
        {"stem": "convolution", "group_channels": 64},
    ],
)
def test_options_are_read_off_the_weights(options, tmp_path):
    model = involution.create_model("rednet26", **options)
    name, found = weights.describe(weights.to_ours(model.state_dict()))
    assert name == "rednet26"
    assert found.items() >= options.items()
    torch.save({"model": model.state_dict(), "ema": None, "step": 3}, tmp_path / "own.pt")
    assert same(load_model(tmp_path / "own.pt").state_dict(), model.state_dict())


def test_torchvisions_resnet_loads(tmp_path):
    reference = torchvision.models.resnet50()
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    model = load_model(tmp_path / "resnet50.pth")
    assert type(model).__name__ == "ResNet"
    assert len(model.layer3) == 6
    assert torch.equal(model.stem.conv1.weight, reference.conv1.weight)


def test_averaged_weights_come_first(tmp_path):
    model, average = involution.create_model("resnet26"), involution.create_model("resnet26")
    ema = {f"module.{k}": v for k, v in average.state_dict().items()} | {"n_averaged": torch.tensor(5)}
    (tmp_path / "run/checkpoints").mkdir(parents=True)
    best = tmp_path / "run/checkpoints/best.pt"
    torch.save({"model": model.state_dict(), "ema": ema, "epoch": 1}, best)
    assert same(load_model(best).state_dict(), average.state_dict())
    assert same(involution.create_model("resnet26", pretrained=tmp_path / "run").state_dict(), average.state_dict())


def test_another_number_of_classes_starts_the_classifier_afresh(tmp_path, caplog):
    source = involution.create_model("rednet26", num_classes=5)
    torch.save(source.state_dict(), tmp_path / "five.pth")
    model = involution.create_model("rednet26", num_classes=7, pretrained=tmp_path / "five.pth")
    assert "no classifier for 7 classes" in caplog.text
    assert model.fc.weight.shape[0] == 7
    assert torch.equal(model.layer4[0].conv3.weight, source.layer4[0].conv3.weight)
    assert involution.create_model("rednet26", num_classes=0, pretrained=tmp_path / "five.pth").num_classes == 0


def test_urls_are_cached_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path / "cache"))
    source = involution.create_model("resnet26", num_classes=4)
    torch.save(source.state_dict(), tmp_path / "model.pth")
    sha256 = hashlib.sha256((tmp_path / "model.pth").read_bytes()).hexdigest()
    url = (tmp_path / "model.pth").as_uri()
    options = {"num_classes": 4, "pretrained": url}
    model = involution.create_model("resnet26", **options, pretrained_sha256=sha256)
    assert same(model.state_dict(), source.state_dict())
    (tmp_path / "model.pth").unlink()
    assert same(involution.create_model("resnet26", **options).state_dict(), source.state_dict()), "not cached"
    [cached] = (tmp_path / "cache" / "weights").glob("*.pth")
    with pytest.raises(ValueError, match=f"has the SHA-256 {sha256}; it should begin with 0123"):
        involution.create_model("resnet26", **options, pretrained_sha256="0123")
    assert not cached.exists(), "a file with another hash must not stay in the cache"
    named = tmp_path / "resnet26-01234567.pth"
    torch.save(source.state_dict(), named)
    with pytest.raises(ValueError, match="should begin with 01234567"):
        involution.create_model("resnet26", num_classes=4, pretrained=named.as_uri())
    with pytest.raises(ValueError, match="cannot be downloaded"):
        involution.create_model("resnet26", pretrained=(tmp_path / "none.pth").as_uri())


class Code:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    text, other, code, cut = (tmp_path / n for n in ("text.pth", "other.pth", "code.pth", "cut.safetensors"))
    text.write_text("no weights")
    cut.write_bytes(b"\xff" * 100)
    torch.save({"a": torch.zeros(1)}, other)
    torch.save({"state_dict": {"a": torch.zeros(1)}, "args": Code(tmp_path / "executed")}, code)
    with pytest.raises(ValueError, match="there is no file"):
        load_model(tmp_path / "none.pth")
    for path, reason in ((text, "torch.save did not"), (code, "it holds [a-z]*.mkdir"), (cut, "")):
        with pytest.raises(ValueError, match=f"cannot be read as weights: .*{reason}"):
            load_model(path)
    assert not (tmp_path / "executed").exists()
    with pytest.raises(ValueError, match="these weights are of no RedNet or ResNet"):
        load_model(other)
    torch.save({"epoch": 3}, other)
    with pytest.raises(ValueError, match="holds no weights"):
        load_model(other)


def test_weights_of_another_model_are_named(tmp_path):
    state = involution.create_model("rednet26", kernel_size=3).state_dict()
    state["extra.weight"] = state.pop("layer1.0.conv1.weight")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="the weights are of another model") as error:
        involution.create_model("rednet26", pretrained=tmp_path / "other.pth")
    assert "missing: layer1.0.conv1.weight; unexpected: extra.weight; of another shape: layer1.0" in str(error.value)
    assert "span.weight (36, 16, 1, 1) instead of (196, 16, 1, 1)" in str(error.value)


def test_torch_hub():
    model = torch.hub.load(str(ROOT), "rednet26", source="local", num_classes=3)
    assert model.num_classes == 3
