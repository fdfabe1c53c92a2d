"""The self-attention family: layers against loops written from their formulas, counts against the papers', options."""

import itertools
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from models_common import ATTENTION
from torch import Tensor, nn

import involution
from involution import involution2d
from involution.complexity import count
from involution.models.aa import AugmentedConvolution, GlobalAttention, distances
from involution.models.axial import AxialAttention
from involution.models.lrnet import LocalRelation
from involution.models.standalone import AttentionStem, LocalAttention

ROOT = Path(__file__).resolve().parents[1]

# parameters (M), also without BatchNorm; G of multiply-adds; FLOPs: the paper's figures, where the counts agree
COUNTS = {
    "lrnet26": (14.747, 14.712, 2.41, 2.46),
    "lrnet50": (23.381, 23.319, 4.06, 4.13),
    "lrnet101": (42.103, 41.978, 7.81, 7.90),
    "standalone_resnet26": (10.323, 10.293, 2.35, 2.38),
    "standalone_resnet38": (14.165, 14.124, 2.97, 3.01),
    "standalone_resnet50": (18.007, 17.954, 3.59, 3.64),
    "san10_pairwise": (10.532, 10.503, 2.04, 2.16),
    "san15_pairwise": (14.065, 14.026, 2.86, 3.02),
    "san19_pairwise": (17.596, 17.546, 3.64, 3.84),
    "san10_patchwise": (11.841, 11.767, 1.79, 1.87),
    "san15_patchwise": (16.181, 16.073, 2.48, 2.58),
    "san19_patchwise": (20.518, 20.377, 3.13, 3.26),  # 20.51847
    "aa_resnet50": (25.809, 25.756, 4.22, 4.25),
    "aa_resnet101": (45.387, 45.281, 8.19, 8.25),
    "aa_resnet152": (61.614, 61.462, 12.14, 12.22),
    "axial_resnet_s": (12.496, 12.406, 3.27, 3.63),
    "axial_resnet_m": (26.548, 26.414, 6.81, 7.21),
    "axial_resnet_l": (45.803, 45.625, 11.61, 12.06),
    "axial_resnet26s": (5.945, 5.899, 1.81, 1.88),
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_and_flops_to_the_last_digit(name: str) -> None:
    with torch.device("meta"):
        model = involution.create_model(name)
        measured = count(model)
    norms = sum(p.numel() for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters())
    found = measured.params / 1e6, (measured.params - norms) / 1e6, measured.macs / 1e9, measured.flops / 1e9
    assert tuple(round(x, digits) for x, digits in zip(found, (3, 3, 2, 2), strict=True)) == COUNTS[name]
    if name != "axial_resnet26s":
        row = rf"\| {name} \| {found[0]:.3f} \| [\d.]+ \| {found[3]:.2f} \| [\d.]+ \| {found[2]:.2f} \|"
        assert re.search(row, (ROOT / "docs" / "models.md").read_text())


def _windows(height: int, width: int, size: int, stride: int = 1):
    """(i, j, [(u, v, y, x) of the taps inside the image]) of each window."""
    for i, j in itertools.product(range(-(-height // stride)), range(-(-width // stride))):
        taps = itertools.product(range(size), range(size))
        places = [(u, v, stride * i + u - size // 2, stride * j + v - size // 2) for u, v in taps]
        yield i, j, [(u, v, y, x) for u, v, y, x in places if 0 <= y < height and 0 <= x < width]


@pytest.fixture(autouse=True)
def _double() -> None:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_stand_alone_layer_is_its_formula() -> None:
    layer, x = LocalAttention(8, 3, 1, heads=2), torch.randn(1, 8, 4, 5)
    query, key, value = (f(x)[0].unflatten(0, (2, 4)) for f in (layer.query, layer.key, layer.value))
    expected = torch.zeros(2, 4, 4, 5)
    for head in range(2):
        for i, j, taps in _windows(4, 5, 3):
            rows = [torch.cat([layer.rows[:, u], layer.columns[:, v]]) for u, v, _, _ in taps]
            keys = torch.stack([key[head, :, y, x] + r for (_, _, y, x), r in zip(taps, rows, strict=True)])
            weights = (keys @ query[head, :, i, j]).softmax(0)
            values = torch.stack([value[head, :, y, x] for _, _, y, x in taps])
            expected[head, :, i, j] = weights @ values
    torch.testing.assert_close(layer(x)[0], expected.flatten(0, 1))
    pooled = LocalAttention(8, 3, 2, heads=2)
    pooled.load_state_dict(layer.state_dict())
    torch.testing.assert_close(pooled(x)[..., :2], F.avg_pool2d(layer(x), 2))  # the last column sticks out
    assert pooled(x).shape == (1, 8, 2, 3)


def test_local_relation_is_its_formula() -> None:
    layer, x = LocalRelation(8, 3, 2, 1, group_channels=4), torch.randn(1, 8, 5, 4)
    query, key, prior = layer.query(x)[0], layer.key(x)[0], layer.prior()
    hidden, out = layer.geometry1, layer.geometry2
    expected = torch.zeros(2, 4, 3, 2)
    for group in range(2):
        for i, j, taps in _windows(5, 4, 3, stride=2):
            scores = []
            for u, v, y, xx in taps:
                geometry = out(hidden(torch.tensor([v - 1.0, 1.0 - u])).relu())  # to the right, up
                torch.testing.assert_close(geometry, prior[:, u, v])
                scores.append(query[group, i, j] * key[group, y, xx] + geometry[group])
            values = torch.stack([x[0, 4 * group : 4 * group + 4, y, xx] for _, _, y, xx in taps])
            expected[group, :, i, j] = torch.stack(scores).softmax(0) @ values
    torch.testing.assert_close(layer(x), layer.project(expected.flatten(0, 1)[None]))


def test_stand_alone_stem_is_an_involution_within_blocks() -> None:
    stem, x = AttentionStem(3, heads=8), torch.randn(2, 3, 8, 10)
    padded = F.pad(x, (0, 2))
    scores = involution.neighbourhood_product(stem.query(padded), stem.key(padded), 7, groups=8)
    place = torch.arange(12)
    block = (place[:, None] // 4 == (place[:, None] + torch.arange(7) - 3) // 4) & (
        place[:, None] + torch.arange(7) - 3 < 10
    )
    rows = place[:8, None] // 4 == (place[:8, None] + torch.arange(7) - 3) // 4
    inside = rows.T[:, None, :, None] & block.T[None, :, None, :]  # (K, K, H, W)
    kernel = scores.masked_fill(~inside, float("-inf")).flatten(2, 3).softmax(2).view_as(scores)
    y = involution2d(stem.mixed(stem.value(padded)), kernel)[..., :10]
    torch.testing.assert_close(stem(x), stem.act1(stem.bn1(y)))


def test_global_attention_is_its_formula() -> None:
    layer, x = GlobalAttention(40, 3), torch.randn(1, 40, 3, 2)
    depth, value_depth = layer.key_channels // 8, layer.value_channels // 8
    assert (depth, value_depth) == (20, 1)
    query, key, value = layer.qkv(x)[0].flatten(1).split([160, 160, 8])
    expected = torch.zeros(8, 1, 6)
    columns = distances(layer.columns, 2)
    for head, i in itertools.product(range(8), range(6)):
        q = query.unflatten(0, (8, 20))[head, :, i] / 20**0.5
        scores = []
        for j in range(6):
            r = layer.rows[j // 2 - i // 2 + 2] + columns[i % 2, j % 2]
            scores.append(q @ (key.unflatten(0, (8, 20))[head, :, j] + r))
        expected[head, :, i] = value.unflatten(0, (8, 1))[head] @ torch.stack(scores).softmax(0)
    torch.testing.assert_close(layer(x), layer.project(expected.view(1, 8, 3, 2)))
    table = torch.arange(-6.0, 7)[:, None]  # whose embeddings are the distances: halved, they count double
    torch.testing.assert_close(distances(table, 7)[..., 0], place_differences(7))
    torch.testing.assert_close(
        distances(torch.cat([table[:1] - 1, table, table[-1:] + 1]), 4)[..., 0], 2 * place_differences(4)
    )
    assert torch.equal(distances(table, 1), torch.zeros(1, 1, 1))
    assert AugmentedConvolution(128, 2, 4, halve=True)(torch.randn(1, 128, 7, 9)).shape == (1, 128, 4, 5)


def place_differences(side: int) -> Tensor:
    """key - query."""
    place = torch.arange(side, dtype=torch.float64)
    return place - place[:, None]


@pytest.mark.parametrize("length", [42, 30])
def test_axial_attention_in_blocks_is_attention_with_a_limited_span(length: int) -> None:
    """In three blocks of queries; with all keys and a mask the same must come out."""
    layer = AxialAttention(16, "height", 509, 15).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(1, 16, length, 3)
    found, blocks = layer(x), layer._blocks

    def whole(query: Tensor, key: Tensor, value: Tensor):
        away = -place_differences(length).long()
        return *(t.unsqueeze(3) for t in (query, key, value)), away, (away.abs() > 7)[None]

    layer._blocks = whole
    torch.testing.assert_close(found, layer(x))
    layer._blocks, layer.axis = blocks, "width"
    torch.testing.assert_close(found, layer(x.transpose(2, 3)).transpose(2, 3))
    assert AxialAttention(24, "width", 509, 15)(torch.randn(2, 24, 3, 30)).shape == (2, 24, 3, 30)
    with pytest.raises(ValueError, match="attention along 9 pixels; the position tables reach 8"):
        AxialAttention(16, "width", 15, None)(torch.randn(1, 16, 3, 9))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rednet26", {"kernel_generation": "san"}, '"bottleneck", "linear", "attention" or "position"'),
        ("rednet26", {"kernel_activation": "relu"}, "kernel_activation is 'relu'; it should be None, \"softmax\""),
        ("standalone_resnet26", {"heads": 3}, "heads is 3; it should divide the layer's 64 channels"),
        ("standalone_resnet26", {"heads": 64}, "heads is 64; .* leave each head an even number"),
        ("standalone_resnet26", {"kernel_size": 4}, "kernel_size is 4; it should be odd"),
        ("standalone_resnet26", {"group_channels": 16}, "unknown option of standalone_resnet26 'group_channels'"),
        ("lrnet26", {"group_channels": 16}, "group_channels is 16; it should divide the layer's 104 channels"),
        ("san10_pairwise", {"kernel_size": 3}, "unknown option of san10_pairwise 'kernel_size'"),
        ("san10_pairwise", {"in_chans": 0}, "in_chans is 0"),
        ("aa_resnet50", {"image_size": 0}, "image_size is 0"),
        ("axial_resnet_s", {"span": 14}, "span is 14; it should be odd"),
        ("san10_pair", {}, "unknown model 'san10_pair'; did you mean 'san10_pairwise'"),
    ],
)
def test_wrong_options_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message), torch.device("meta"):
        involution.create_model(name, **options)


def test_images_that_are_too_small_or_too_large() -> None:
    with torch.device("meta"):
        with pytest.raises(ValueError, match=r"features of 2 x 5 pixels cannot be .* at least 128 pixels a side"):
            involution.create_model("san10_patchwise")(torch.empty(1, 3, 64, 160))
        with pytest.raises(ValueError, match="attention along 64 pixels; the position tables reach 56"):
            involution.create_model("axial_resnet26s")(torch.empty(1, 3, 256, 256))
        assert involution.create_model("axial_resnet26s", image_size=256)(torch.empty(1, 3, 256, 256)).shape == (
            1,
            1000,
        )


NAMES = ("san10_pairwise", "standalone_resnet26", "lrnet26", "aa_resnet50", "axial_resnet_m")


@pytest.mark.parametrize("name", NAMES)
def test_sizes_and_levels(name: str) -> None:
    """The pyramid's levels for odd sizes."""
    small = 130 if name.startswith("san") else 65
    with torch.device("meta"):
        empty = involution.create_model(name, num_classes=0)
        x = empty.stem(torch.empty(2, 3, small, 160))
        levels = [x, x := empty.layer1(empty.maxpool(x)), x := empty.layer2(x), x := empty.layer3(x), empty.layer4(x)]
    down = (lambda n, r: n // r) if name.startswith("san") else (lambda n, r: -(-n // r))
    for level, info in zip(levels, empty.feature_info, strict=True):
        reduction = info["reduction"]
        assert level.shape == (2, info["num_chs"], down(small, reduction), down(160, reduction)), info
    assert empty.num_features == empty.feature_info[-1]["num_chs"]


@pytest.mark.parametrize("name", ATTENTION)
def test_a_training_step(name: str) -> None:
    """Gradients everywhere, and the same from both memory formats."""
    make, side = ATTENTION[name]
    model, images, losses = make(), torch.randn(2, 3, side, side - 1), []
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, 0.5, 1)  # every branch is alive
    for layout in (torch.contiguous_format, torch.channels_last):
        model.to(memory_format=layout).zero_grad()
        losses.append(F.cross_entropy(model(images.to(memory_format=layout)), torch.tensor([1, 2])))
        losses[-1].backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(*losses)
    model.freeze(1)
    assert not any(p.requires_grad for p in model.stem.parameters())


@pytest.mark.parametrize("name", ["standalone_resnet26", "lrnet26"])
def test_a_batch_of_no_images(name):
    model = involution.create_model(name, num_classes=3).eval()
    assert model(torch.randn(0, 3, 64, 64)).shape == (0, 3)
