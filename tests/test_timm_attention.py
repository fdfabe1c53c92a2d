"""The self-attention family in timm: features, weights; test_timm.py has what all networks share."""

import pytest
import timm
import torch
from models_common import fitted

import involution

SMALLEST = ("san10_patchwise", "standalone_resnet26", "lrnet26", "aa_resnet50", "axial_resnet_s", "axial_resnet26s")


@pytest.mark.parametrize("name", SMALLEST)
def test_features(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, features_only=True).eval()
        images = torch.empty(1, 3, 192, 160)
        for feature, channels, reduction in zip(
            model(images), model.feature_info.channels(), model.feature_info.reduction(), strict=True
        ):
            assert feature.shape == (1, channels, 192 // reduction, 160 // reduction)


def test_forward_and_released_weights(tmp_path) -> None:
    torch.manual_seed(0)
    source = fitted(involution.create_model("standalone_resnet26", num_classes=1000))
    torch.save(source.state_dict(), tmp_path / "ours.pth")
    overlay = {"file": str(tmp_path / "ours.pth")}
    model = timm.create_model("standalone_resnet26", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), source(images))
    gray = timm.create_model("standalone_resnet26", pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    torch.testing.assert_close(gray.stem.value.weight, source.stem.value.weight.sum(1, keepdim=True))
    model.set_grad_checkpointing()
    model.train()(images).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
