"""What detectors and segmentors share: the backbone and the pyramid."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import involution
from involution.dense import plugins
from involution.dense.backbone import LEVELS, Backbone, build_backbone
from involution.dense.pyramid import FeaturePyramid
from involution.weights import to_released


def test_a_frozen_backbone_trains_affine_parameters_of_later_stages_alone():
    backbone = build_backbone({"name": "rednet26", "freeze": 1, "norm_eval": True}).eval().train()
    assert not any(module.training for module in backbone.modules() if isinstance(module, _BatchNorm))
    assert backbone.layer2.training
    trains = {name.split(".")[0] for name, p in backbone.named_parameters() if p.requires_grad}
    assert trains == {"layer2", "layer3", "layer4"}
    before = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    sum(level.square().mean() for level in backbone(torch.randn(1, 3, 65, 97))).backward()
    assert all(torch.equal(buffer, before[name]) for name, buffer in backbone.named_buffers())
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    assert backbone.layer4[0].bn3.weight.grad.abs().sum() > 0


def test_everything_trains_where_nothing_is_frozen():
    backbone = build_backbone("resnet26").train()
    assert all(p.requires_grad for p in backbone.parameters())
    assert all(module.training for module in backbone.modules())


@pytest.mark.parametrize(
    ("neck", "extra", "levels"), [("involution", "subsample", 5), ("convolution", "convolution", 5)]
)
def test_a_pyramid_of_odd_sizes(neck, extra, levels):
    pyramid = FeaturePyramid(LEVELS, neck, extra).train()
    sizes = [(25, 33), (13, 17), (7, 9), (4, 5)]
    found = pyramid([torch.randn(1, c, *size) for c, size in zip(LEVELS, sizes)])
    assert [tuple(x.shape[1:]) for x in found[:4]] == [(256, *size) for size in sizes]
    assert len(found) == levels + (extra == "convolution")
    assert tuple(found[4].shape[2:]) == (2, 3)
    sum(x.sum() for x in found).backward()
    assert all(p.grad is not None for p in pyramid.parameters())
    assert not any(m.bias.any() for m in pyramid.modules() if isinstance(m, nn.Conv2d) and m.bias is not None)


@pytest.mark.parametrize("name", ["standalone_resnet26", "lrnet26", "aa_resnet50"])
def test_attention_as_backbone(name):
    backbone = build_backbone({"name": name, "freeze": 1}).train()
    found = backbone(torch.randn(2, 3, 65, 97))
    sizes = [(17, 25), (9, 13), (5, 7), (3, 4)]
    assert [tuple(x.shape[1:]) for x in found] == [(c, *size) for c, size in zip(LEVELS, sizes)]
    sum(x.square().mean() for x in found).backward()
    assert all((p.grad is not None) == p.requires_grad for p in backbone.parameters())
    for other in ("san10_pairwise", "axial_resnet26s"):
        with torch.device("meta"), pytest.raises(ValueError, match="no network of bottlenecks"):
            build_backbone(other)


def test_a_backbone_starts_from_a_classifier_s_weights(tmp_path):
    model = involution.create_model("rednet26", num_classes=5, stem_kernel_size=7)
    torch.save(model.state_dict(), tmp_path / "ours.pt")
    torch.save({"state_dict": to_released(model.state_dict())}, tmp_path / "released.pth")
    for file in ("ours.pt", "released.pth"):
        backbone = build_backbone({"name": "rednet26", "pretrained": tmp_path / file})
        state = backbone.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key[:2] != "fc")
    with pytest.raises(ValueError, match="stem_kernel_size=3"):
        build_backbone({"name": "rednet26", "pretrained": tmp_path / "ours.pt", "stem_kernel_size": 3})


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "should have a name"),
        ({"name": "rednet51"}, "rednet50"),
        ({"name": "rednet50", "kernelsize": 3}, "kernel_size"),
        ({"name": "rednet50", "output_stride": 8}, "output_stride"),
        ({"name": "resnet50", "stem": "shallow"}, "deep"),
    ],
)
def test_wrong_backbones(config, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_backbone(config)


@pytest.mark.parametrize("plugin", plugins.PLUGINS)
def test_a_plugin_takes_autocast_and_is_frozen_with_its_stage(plugin):
    backbone = Backbone("resnet26", freeze=4)
    plugins.add(backbone, plugin)
    assert not any(p.requires_grad for p in backbone.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert backbone(torch.randn(1, 3, 64, 64))[-1].isfinite().all()


def test_a_backbone_has_no_classifier_to_freeze():
    with pytest.raises(ValueError, match=r"backbone\.freeze is .*has no classifier fc"):
        Backbone("resnet26", freeze=["fc"])


@pytest.mark.parametrize("plugin", plugins.PLUGINS)
def test_what_a_plugin_adds_starts_at_zero_and_trains(plugin):
    x = torch.randn(1, 3, 64, 64)
    backbone = build_backbone({"name": "resnet26", "freeze": 1, "norm_eval": True}).train()
    with torch.no_grad():
        before = backbone(x)
    plugins.add(backbone, plugin)
    assert not any(module.training for module in backbone.modules() if isinstance(module, _BatchNorm))
    after = backbone(x)
    for old, new in zip(before, after):
        torch.testing.assert_close(new, old)
    sum(level.square().mean() for level in after).backward()
    assert all(p.grad is not None for p in backbone.parameters() if p.requires_grad)


def test_criss_cross_attention_against_a_loop():
    """Each pixel looks at its row and its column, at itself once."""
    torch.manual_seed(0)
    block = plugins.CrissCross(16).double()
    block.gamma.data.fill_(0.5)
    x = torch.randn(1, 16, 4, 5, dtype=torch.float64)
    query, key, value = block.query(x)[0], block.key(x)[0], block.value(x)[0]
    found = block._once(x)[0]
    for i in range(4):
        for j in range(5):
            seen = [(i, c) for c in range(5)] + [(r, j) for r in range(4) if r != i]
            weights = torch.stack([query[:, i, j] @ key[:, r, c] for r, c in seen]).softmax(0)
            attended = sum(w * value[:, r, c] for w, (r, c) in zip(weights, seen))
            torch.testing.assert_close(found[:, i, j], x[0, :, i, j] + 0.5 * attended)
