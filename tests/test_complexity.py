"""Parameters and FLOPs against the paper's figures."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

import involution
from involution import Involution2d
from involution.complexity import count

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model_table():
    spec = importlib.util.spec_from_file_location("model_table", ROOT / "scripts" / "model_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "params", "flops", "macs"),
    [
        ("rednet26", 9.233, 1.71, 1.69),
        ("rednet38", 12.387, 2.20, 2.17),
        ("rednet50", 15.541, 2.69, 2.65),
        ("rednet101", 25.653, 4.72, 4.66),
        ("rednet152", 33.985, 6.76, 6.68),
    ],
)
def test_rednets_to_the_last_digit(model_table, name, params, flops, macs):
    measured = model_table.measure(name)
    assert round(measured.params / 1e6, 3) == params
    assert round(measured.flops / 1e9, 2) == flops
    assert round(measured.macs / 1e9, 2) == macs


def test_tables_1_and_6_within_a_tenth(model_table):
    rows = model_table.table1() + model_table.table6()
    assert len(rows) == 10 + 14
    for name, ours, paper in rows:
        assert abs(ours.params / 1e6 - float(paper["params_m"])) < 0.1, name
        assert abs(ours.flops / 1e9 - float(paper["flops_g"])) < 0.1, name
    documented = (ROOT / "docs" / "models.md").read_text()
    assert model_table.markdown("Table 1", rows[:10]) in documented
    assert model_table.markdown("Table 6 (RedNet-50)", rows[10:]) in documented


@pytest.mark.parametrize("generation", ["bottleneck", "linear"])
def test_a_single_layer_follows_the_formula(generation):
    c, k, g, r, h, w = 64, 7, 4, 4, 10, 12
    layer = Involution2d(c, k, kernel_generation=generation)
    kernels = (c * c + k * k * g * c) // r if generation == "bottleneck" else k * k * g * c
    assert count(layer, (c, h, w)).macs == h * w * (kernels + k * k * c)
    assert count(layer, (c, h, w)).params == sum(p.numel() for p in layer.parameters())


def test_a_replaced_generator_is_counted_by_its_own_layers():
    layer = Involution2d(16, 3, group_channels=None)
    fused = count(layer, (16, 8, 8))
    generation = layer.kernel_generation
    layer.kernel_generation = nn.Sequential(generation.reduce, generation.norm, generation.act, generation.span)
    assert count(layer, (16, 8, 8)).macs == fused.macs
    assert count(layer, (16, 8, 8)).flops == fused.flops


def test_counting_leaves_the_model_as_it_was():
    model = involution.create_model("rednet26", num_classes=10)
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measured = count(model, (3, 64, 64))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert measured.params == sum(p.numel() for p in model.parameters())
    assert measured.input_size == (3, 64, 64)
    assert str(measured).splitlines()[1].split()[:6] == ["stem", "64", "x", "32", "x", "32"]
    assert str(measured).splitlines()[-1].startswith("total")


class _Odd(nn.Module):
    """What timm's models do: parameters of their own, shared ones, keyword arguments, outputs that are no tensor."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x):
            return self.layer(input=x.movedim(1, -1)), (x.shape[2], x.shape[3])

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(7))
        self.patches, self.again = self.Patches(), self.Patches()
        self.again.layer.weight = self.patches.layer.weight

    def forward(self, x):
        return self.patches(x)[0] + self.again(x)[0]


def test_parameters_count_once_wherever_they_are():
    found = count(_Odd(), (3, 8, 8))
    assert found.params == 7 + 15 + 2 * 5
    assert found.macs == 2 * 64 * 15
    assert [(part.name, part.params) for part in found.parts] == [("own", 7), ("patches", 20), ("again", 5)]
    assert found.parts[1].output == (8, 8, 5)
