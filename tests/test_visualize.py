"""Figure 3: the heat maps are the sums of the kernels that the layer really uses, and looking changes nothing."""

import pytest
import torch
from models_common import ATTENTION

from involution import create_model
from involution.visualize import find_layer, heat_map_picture, involutions, kernel_heat_maps


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"kernel_generation": "linear"}, {"group_channels": None, "kernel_size": 3}])
def test_the_maps_are_the_sums_of_the_kernels(images, options):
    model = create_model("rednet26", num_classes=0, **options).eval()
    layer, made = model.layer2[1].conv2, []
    hook = layer.register_forward_pre_hook(lambda module, args: made.append(module.kernel_generation(*args)))
    maps = kernel_heat_maps(model, images)
    hook.remove()
    expected = made[0].unflatten(1, (layer.groups, -1)).sum(2)
    assert maps.shape == (2, layer.groups, 8, 6)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


def maps_and_kernels(model, images):
    """The maps, and the kernels of the layer shown."""
    layer, seen = involutions(model)[find_layer(model)], []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.extend(args))
    maps = kernel_heat_maps(model.eval(), images)
    hook.remove()
    return maps, layer.kernel(seen[0])


@pytest.mark.parametrize("name", ["standalone", "lrnet", "pairwise", "patchwise"])
def test_attention_is_shown_by_its_squares_for_its_sums_are_one(name):
    make, side = ATTENTION[name]
    model = make()
    assert find_layer(model) == "conv3_1"
    maps, kernel = maps_and_kernels(model, torch.randn(1, 3, side, side))
    if name == "patchwise":  # has no softmax
        torch.testing.assert_close(maps, kernel.sum((2, 3)), rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(kernel.sum((2, 3)), torch.ones_like(maps))
    torch.testing.assert_close(maps, kernel.square().sum((2, 3)))
    assert maps.std() > 0


@pytest.mark.parametrize("generation", ["attention", "linear"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_kernels_with_an_activation(images, generation, activation):
    options = {"kernel_generation": generation, "kernel_activation": activation}
    model = create_model("rednet26", num_classes=0, **options)
    maps, kernel = maps_and_kernels(model, images[:1])
    torch.testing.assert_close(maps, (kernel.square() if activation == "softmax" else kernel).sum((2, 3)))


def test_a_generator_of_ones_own(images):
    model = create_model("rednet26", num_classes=0)
    ours = model.layer2[1].conv2
    ours.kernel_generation = torch.nn.Conv2d(128, ours.groups * 49, 1, bias=False)
    assert kernel_heat_maps(model, images).shape == (2, 8, 8, 6)


def test_layers_have_the_papers_names():
    model = create_model("rednet50", num_classes=0)
    found = involutions(model)
    assert found["conv3_4"] is model.layer2[3].conv2
    assert list(found)[:2] == ["stem.conv2", "conv2_1"]
    assert find_layer(model) == "conv3_4"
    assert find_layer(create_model("rednet26")) == "conv3_2"
    assert find_layer(create_model("resnet26")) is None
    with pytest.raises(ValueError, match=r"no involution layer conv9_9; this model has stem.conv2, conv2_1,"):
        find_layer(model, "conv9_9")
    with pytest.raises(ValueError, match="no involutions"):
        kernel_heat_maps(create_model("resnet26"), torch.zeros(1, 3, 32, 32))


def test_looking_changes_nothing(images):
    model = create_model("rednet26", num_classes=0).train()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, random = [module.training for module in model.modules()], torch.get_rng_state()
    kernel_heat_maps(model, images, "stem.conv2")
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_the_picture_has_the_image_and_its_maps_in_a_row(images):
    maps = torch.linspace(0, 1, 12).reshape(1, 1, 3, 4).expand(2, 3, 3, 4)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)
    picture = heat_map_picture(images, maps, mean, std, groups=2)
    assert picture.shape == (3, 2 * 65 - 1, 3 * 49 - 1)
    assert 0 <= picture.min() <= picture.max() <= 1
    shown = (images[1] * 0.2 + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    torch.testing.assert_close(picture[:, 65:, :48], shown)
    low, high = picture[:, 0, 49], picture[:, 63, 49 + 47]  # corners of the first map
    assert low[2] > low[0], "the lowest is blue"
    assert high[0] > high[2], "the highest is red"
