"""`involution.convert`: a network's convolutions become involutions."""

import pytest
import torch
from torch import nn

import involution
from involution import Involution2d


class UNet(nn.Module):
    """Two levels, with a convolution of every kind that a network may have."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.middle = nn.Conv2d(24, 24, 3, padding=2, dilation=2)
        self.shared = self.middle
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.grouped = nn.Conv2d(24, 24, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(24, 24, 2, 2)
        self.patch = nn.Conv2d(24, 24, 2, 2)
        self.long = nn.Conv2d(24, 24, (1, 7), padding=(0, 3))
        self.mirrored = nn.Conv2d(24, 24, 3, padding=1, padding_mode="reflect")
        self.even = nn.Conv2d(24, 24, 4, padding="same")
        self.head = nn.Conv2d(24, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.depthwise(self.grouped(self.shared(self.middle(self.down(x)))))
        return self.head(self.even(self.mirrored(self.long(self.up(self.patch(self.up(x)))))))


LEFT = {
    "depthwise": "depthwise",
    "grouped": "2 groups",
    "long": "not the same along both axes",
    "mirrored": "reflect padding",
}


def test_every_kind_of_convolution_is_converted_or_left_with_a_reason():
    torch.manual_seed(0)
    net = UNet().eval()
    images = torch.randn(2, 3, 33, 18)
    shape = net(images[..., :32, :16]).shape
    found = involution.convert(net, kernel_size=5)
    assert found.converted == ["down.0", "middle", "shared", "even"]
    reasons = {change.name: change.reason for change in found.changes if change.after is None}
    assert {name: reasons[name] for name in LEFT} == LEFT
    assert "with which the size is not ceil(size / 2)" in reasons["patch"]
    assert net.middle is net.shared
    assert (net.middle.kernel_size, net.middle.dilation, net.middle.group_channels) == (5, 2, 12)
    front, layer = net.down[0]
    assert (front.kernel_size, front.in_channels, layer.stride) == ((1, 1), 3, 2)
    assert not layer.training
    assert net(images[..., :32, :16]).shape == shape
    assert net.down(images).shape == (2, 24, 17, 9)
    again = involution.convert(net, grouped=True, skip=["dep*"])
    assert again.converted == ["grouped"], "involutions are left alone"


def test_a_dry_run_counts_what_the_conversion_does_and_changes_nothing():
    net = involution.create_model("resnet26", num_classes=5)
    state, random = {key: value.clone() for key, value in net.state_dict().items()}, torch.get_rng_state()
    planned = involution.convert(net, skip=["stem"], dry_run=True, input_size=(3, 64, 64))
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in state.items())
    rednet = involution.create_model("rednet26", num_classes=5, stem="convolution")
    counts = [involution.complexity.count(each, (3, 64, 64)) for each in (net, rednet)]
    assert planned.params == tuple(each.params for each in counts), "ResNet's trunk becomes RedNet's"
    assert planned.flops == tuple(each.flops for each in counts)
    done = involution.convert(net, skip=["stem"], input_size=(3, 64, 64))
    assert str(done) == str(planned)
    assert "layer1.0.conv2: 64 -> 64, 3 x 3 -> involution 7 x 7, 16 channels a group" in str(done)
    assert "stem.conv1: 3 -> 64, 7 x 7: left (skipped)" in str(done)
    assert [*net.state_dict()] == [*rednet.state_dict()]


def test_type_freezing_and_own_kernel_sizes_are_kept():
    net = (
        nn.Sequential(nn.Conv2d(8, 8, 5, padding=2), nn.Conv2d(8, 8, 4, padding="same")).double().requires_grad_(False)
    )
    found = involution.convert(net, kernel_size=None, group_channels=None, reduction_ratio=64)
    assert found.changes[1].reason == "an even kernel has no centre"
    assert isinstance(net[0], Involution2d)
    assert (net[0].kernel_size, net[0].groups, net[0].reduction_ratio) == (5, 1, 8)
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in net[0].parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skip": ["conv9"]}, "'conv9' fits none of the convolutions: 0"),
        ({"skip": "0"}, "should be a list of names"),
        ({"kernel_size": 4}, "kernel_size is 4; it should be odd"),
        ({"group_channels": 0}, "group_channels is 0"),
    ],
)
def test_impossible_conversions(options, message):
    net = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(ValueError, match=message):
        involution.convert(net, **options)
    with pytest.raises(ValueError, match="convert what it is in"):
        involution.convert(net[0])


def test_models_of_timm_are_made_with_involutions(tmp_path):
    plain = involution.create_model("resnet10t", 2, library="timm")
    torch.save(plain.state_dict(), tmp_path / "plain.pth")
    made = {"library": "timm", "convert": {"kernel_size": 3, "skip": ["conv1"]}}
    model = involution.create_model("resnet10t", 2, tmp_path / "plain.pth", **made)
    assert torch.equal(model.conv1[0].weight, plain.conv1[0].weight)
    assert isinstance(model.layer1[0].conv1, Involution2d)
    torch.save(model.state_dict(), tmp_path / "converted.pth")
    again = involution.create_model("resnet10t", 2, tmp_path / "converted.pth", **made)
    span = "layer1.0.conv1.kernel_generation.span.weight"
    assert torch.equal(again.state_dict()[span], model.state_dict()[span])
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"convert=\{grouped: true\} takes depthwise ones"):
            involution.create_model("convnext_atto", library="timm", convert=True)
        net = involution.create_model("convnext_atto", library="timm", convert={"grouped": True})
        assert isinstance(net.stages[0].blocks[0].conv_dw, Involution2d)
        with pytest.raises(ValueError, match="unknown option of convert 'kernel'; did you mean 'kernel_size'"):
            involution.create_model("resnet10t", library="timm", convert={"kernel": 3})
