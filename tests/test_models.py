"""RedNets and ResNets: names and options, initialisation, shapes, and parity with torchvision's and timm's ResNets."""

import pytest
import timm
import torch
import torchvision
from models_common import fitted
from torch import nn

import involution
from involution import Involution2d
from involution.models import MODELS


def resnet_weights(reference: nn.Module) -> dict[str, torch.Tensor]:
    """torchvision's and timm's names of a ResNet's weights -> ours."""
    state = reference.state_dict()
    return {f"stem.{k}" if k.startswith(("conv1.", "bn1.")) else k: v for k, v in state.items()}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith(("rednet", "resnet"))])
def test_every_name_makes_its_model(name):
    with torch.device("meta"):
        model = involution.create_model(name, num_classes=7)
        assert model(torch.empty(2, 3, 65, 96)).shape == (2, 7)
        assert model.forward_features(torch.empty(2, 3, 65, 96)).shape == (2, 2048, 3, 3)
    depth = int(name.removeprefix("rednet").removeprefix("resnet"))
    layers = [
        m for n, m in model.named_modules() if n.startswith("layer") and n.split(".")[-1] in ("conv1", "conv2", "conv3")
    ]
    assert len(layers) == depth - 2  # the name counts the stem's and the classifier's as one each
    involutions = [m for m in layers if isinstance(m, Involution2d)]
    assert len(involutions) == (len(layers) // 3 if name.startswith("rednet") else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "stem_kernel_size": 7},
        {"group_channels": None, "reduction_ratio": 16},
        {"group_channels": 1, "kernel_size": 3, "reduction_ratio": 1},
        {"kernel_generation": "linear"},
        {"stem": "convolution", "in_chans": 1},
        {"num_classes": 0, "zero_init_residual": False},
    ],
)
def test_options_train(options):
    torch.manual_seed(0)
    model = involution.create_model("rednet26", **{"num_classes": 5, **options})
    images = torch.randn(2, options.get("in_chans", 3), 64, 48)
    out = model(images)
    assert out.shape == (2, options.get("num_classes", 5) or 2048)
    out.sum().backward()
    if options.get("num_classes") != 0:
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_options_reach_every_involution():
    model = involution.create_model("rednet26", kernel_size=5, group_channels=8, reduction_ratio=2, stem_kernel_size=7)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Involution2d)}
    assert {n: m.kernel_size for n, m in layers.items() if m.kernel_size != 5} == {"stem.conv2": 7}
    assert {(m.group_channels, m.reduction_ratio) for m in layers.values()} == {(8, 2)}
    assert [m.stride for m in layers.values()] == [1, 1, 2, 1, 2, 1, 1, 1, 2]


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    model = involution.create_model("rednet50")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            if module.weight.numel() > 5000:
                assert abs(module.weight.std() / (2 / fan_out) ** 0.5 - 1) < 0.05, name
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, nn.BatchNorm2d):
            last_of_branch = name.startswith("layer") and name.endswith("bn3")
            assert (module.weight == (0 if last_of_branch else 1)).all(), name
            assert not module.bias.any()
    assert abs(model.fc.weight.std() - 0.01) < 1e-4
    model = involution.create_model("rednet26", zero_init_residual=False)
    assert all((m.weight == 1).all() for m in model.modules() if isinstance(m, nn.BatchNorm2d))


def test_resnet50_is_torchvisions():
    reference = fitted(torchvision.models.resnet50(num_classes=10))
    model = involution.create_model("resnet50", num_classes=10).eval()
    model.load_state_dict(resnet_weights(reference))
    images = torch.randn(2, 3, 96, 65)
    with torch.no_grad():
        torch.testing.assert_close(model(images), reference(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dilated_resnet50_is_timms(output_stride):
    reference = fitted(timm.create_model("resnet50", num_classes=10, output_stride=output_stride))
    model = involution.create_model("resnet50", num_classes=10, output_stride=output_stride).eval()
    model.load_state_dict(resnet_weights(reference))
    images = torch.randn(1, 3, 96, 64)
    with torch.no_grad():
        features = model.forward_features(images)
        torch.testing.assert_close(features, reference.forward_features(images), rtol=1e-5, atol=1e-5)
    assert features.shape[2:] == (96 // output_stride, 64 // output_stride)


def test_eval_is_independent_of_memory_format_and_batch():
    # float64: a RedNet with random weights amplifies rounding about a thousandfold
    model = fitted(involution.create_model("rednet26", num_classes=10).double())
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = model(images)
        assert expected.isfinite().all()
        assert expected.std() > 1e-3
        torch.testing.assert_close(model(images[1:2]), expected[1:2])
        model.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
        torch.testing.assert_close(model(images), expected)
        assert model.forward_features(images).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(model.forward_head(model.forward_features(images)), expected)
        assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (3, 2048)


def test_compiles_as_one_graph():
    model = fitted(involution.create_model("rednet26", num_classes=10).double())
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(images)
        torch.testing.assert_close(compiled, model(images))


def test_reset_classifier():
    model = involution.create_model("resnet26", num_classes=10)
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, model.num_features)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rednet5", {}, "unknown model 'rednet5'; did you mean 'rednet50'"),
        ("rednet50", {"kernal_size": 3}, "unknown option of rednet50 'kernal_size'; did you mean 'kernel_size'"),
        ("resnet50", {"kernel_size": 3}, "unknown option of resnet50 'kernel_size'"),
        ("rednet50", {"stem": "patch"}, 'stem is \'patch\'; it should be "involution" or "convolution"'),
        ("rednet50", {"stem_kernel_size": 4}, "stem_kernel_size is 4"),
        ("rednet50", {"num_classes": -1}, "num_classes is -1"),
        ("rednet50", {"in_chans": 0}, "in_chans is 0"),
        ("rednet50", {"output_stride": 4}, "output_stride is 4; it should be 8, 16 or 32"),
        ("rednet50", {"group_channels": 48}, "group_channels=48 does not divide the stem's 32 channels: take"),
    ],
)
def test_wrong_names_and_values_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        involution.create_model(name, **options)
