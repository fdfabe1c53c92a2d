"""Our networks in timm, after what timm's own tests of models expect."""

import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from models_common import fitted
from timm.models import get_pretrained_cfg, is_model, list_models

import involution
from involution.models.timm_models import MAKERS

ROOT = Path(__file__).resolve().parents[1]
NAMES = ["rednet26", "rednet38", "rednet50", "rednet101", "rednet152"]


@pytest.mark.parametrize("first", ["involution", "timm"])
def test_registered_in_either_order_of_imports(first):
    second = "timm" if first == "involution" else "involution"
    code = f"import {first}, {second}; timm.create_model('rednet26', num_classes=2)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_names_and_configuration():
    assert list_models("rednet*") == sorted(NAMES, key=lambda name: int(name[6:]))
    assert all(is_model(name) for name in NAMES)
    cfg = get_pretrained_cfg("rednet50")
    assert cfg.input_size == (3, 224, 224)
    assert cfg.crop_pct == 0.875
    assert cfg.architecture == "rednet50"


@pytest.mark.parametrize("name", MAKERS)
def test_weights_have_our_names(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = involution.create_model(name, num_classes=7), timm.create_model(name, num_classes=7, in_chans=3)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    cfg, keys = theirs.default_cfg, theirs.state_dict().keys()
    first = cfg["first_conv"]
    for layer in (first,) if isinstance(first, str) else first:
        assert theirs.get_submodule(layer).in_channels == 3
        assert f"{layer}.weight" in keys


def test_forward_and_backward():
    torch.manual_seed(0)
    model = timm.create_model("rednet26", num_classes=42, in_chans=1, drop_rate=0.1)
    out = model(torch.randn(2, 1, 64, 64))
    assert out.shape == (2, 42)
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    plain = involution.create_model("rednet26", num_classes=42, in_chans=1)
    plain.load_state_dict(fitted(model).state_dict())
    images = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(plain.eval()(images), model(images))


def test_default_cfg_tells_the_truth():
    model = timm.create_model("rednet26").eval()
    cfg, keys = model.default_cfg, model.state_dict().keys()
    assert f"{cfg['classifier']}.weight" in keys
    assert f"{cfg['first_conv']}.weight" in keys
    assert model.get_classifier() is model.fc
    assert model.get_classifier(name_only=True) == "fc"
    images = torch.randn(1, *cfg["input_size"])
    with torch.no_grad():
        assert model(images).isfinite().all(), "a fresh model, as timm tests it"
        assert model.forward_features(images).shape[-2:] == cfg["pool_size"]
        model.reset_classifier(0)
        assert model(images).shape == (1, model.num_features)
        assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (1, model.head_hidden_size)
        model.reset_classifier(0, "")
        assert model(images).shape == (1, model.num_features, *cfg["pool_size"])
        model.reset_classifier(5, "max")
        assert model(images).shape == (1, 5)


def test_a_device_and_a_type_are_kept_as_timm_tests_them():
    model = timm.create_model("rednet26", device="meta", dtype=torch.float64, in_chans=4).eval()
    assert model.in_chans == 4
    model.reset_classifier(0)
    model.reset_classifier(2, "max")
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert not any(module.training for module in model.modules())
    with pytest.raises(TypeError):
        timm.create_model("rednet26", device="meta", not_an_option=1)


@pytest.mark.parametrize("output_stride", [8, 16, 32])
@pytest.mark.parametrize("feature_cls", [None, "hook", "getter", "dict", "fx"])
def test_features(output_stride, feature_cls):
    options = {"feature_cls": feature_cls} if feature_cls else {}
    model = timm.create_model("rednet26", features_only=True, output_stride=output_stride, **options).eval()
    assert model.feature_info.channels() == [64, 256, 512, 1024, 2048]
    assert model.feature_info.reduction() == [2, 4, 8, min(16, output_stride), output_stride]
    features = model(torch.randn(1, 3, 96, 64))
    features = list(features.values()) if isinstance(features, dict) else features
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 96 // reduction, 64 // reduction)


def test_chosen_features():
    model = timm.create_model("rednet26", features_only=True, out_indices=(1, 3))
    assert [f.shape[1] for f in model(torch.randn(2, 3, 64, 64))] == [256, 1024]
    assert not any(name.startswith("layer4") for name, _ in model.named_parameters())


def test_intermediates():
    model = fitted(timm.create_model("rednet26", num_classes=5))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        final, levels = model.forward_intermediates(images)
        assert torch.equal(final, model.forward_features(images))
        assert torch.equal(final, levels[-1])
        assert [x.shape[1] for x in levels] == [64, 256, 512, 1024, 2048]
        early = model.forward_intermediates(images, [0, 2], stop_early=True, intermediates_only=True)
        assert torch.equal(early[0], levels[0])
        assert torch.equal(early[1], levels[2])
        assert model.prune_intermediate_layers([0, 2]) == [0, 2]
        pruned = model.forward_intermediates(images, [0, 2], stop_early=True, intermediates_only=True)
        assert torch.equal(pruned[1], levels[2])
        assert len(model.layer3) == 0
        assert model.num_features == 512
        assert model(images).shape == (1, 512, 8, 8)


def test_grad_checkpointing_changes_nothing():
    torch.manual_seed(0)
    model = timm.create_model("rednet26", num_classes=3).double()
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_layer_groups_cover_every_parameter():
    from timm.models import group_parameters

    model = timm.create_model("rednet26")
    for coarse, groups in ((True, 1 + 4 + 1), (False, 1 + 8 + 1)):
        named = group_parameters(model, model.group_matcher(coarse=coarse))
        assert len(named) == groups
        assert sum(len(names) for names in named.values()) == len([*model.parameters()])


def test_pretrained_files_load(tmp_path):
    source = involution.create_model("rednet26")
    torch.save({"state_dict": involution.weights.to_released(source.state_dict())}, tmp_path / "released.pth")
    overlay = {"file": str(tmp_path / "released.pth")}
    model = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, in_chans=1)
    assert torch.equal(model.layer1[0].conv1.weight, source.layer1[0].conv1.weight)
    torch.testing.assert_close(model.stem.conv1.weight, source.stem.conv1.weight.sum(1, keepdim=True))
    assert model.fc.weight.shape == (7, 2048)
    features = timm.create_model("rednet26", pretrained=True, pretrained_cfg_overlay=overlay, features_only=True)
    assert torch.equal(features.layer4[0].conv3.weight, source.layer4[0].conv3.weight)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"global_pool": "mean"}, "global_pool is 'mean'"), ({"global_pool": ""}, 'global_pool is ""; num_classes')],
)
def test_impossible_pooling_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("rednet26", **options)


def test_symbolic_tracing_keeps_the_layer_whole():
    """As timm's tests of torch.fx do: forward, backward, features."""
    from timm.models import get_notrace_functions, get_notrace_modules
    from torchvision.models.feature_extraction import create_feature_extractor

    kept = {"leaf_modules": get_notrace_modules(), "autowrap_functions": get_notrace_functions()}
    model = timm.create_model("rednet26", num_classes=4)
    images = torch.randn(2, 3, 64, 64)
    graph = create_feature_extractor(model, ["fc"], tracer_kwargs=kept | {"param_shapes_constant": True})
    graph(images)["fc"].mean().backward()
    assert all(p.grad is not None for p in graph.parameters())
    with torch.no_grad():
        expected = fitted(model)(images)
        assert torch.equal(graph.eval()(images)["fc"], expected)
