"""The self-attention families folded, and exported: a small network of each, against itself."""

from pathlib import Path

import pytest
import torch
from models_common import ATTENTION, fitted
from torch import nn

import involution
from involution import export
from involution.models.aa import AugmentedConvolution
from involution.models.axial import AxialAttention
from involution.models.lrnet import LocalRelation
from involution.models.san import SelfAttention
from involution.models.standalone import AttentionStem, LocalAttention

#: BatchNorms that fold leaves, of how many
LEFT = {
    "standalone": (5, 17), "lrnet": (5, 18), "pairwise": (25, 26), "patchwise": (25, 26), "aa": (3, 17),
    "axial": (42, 61), "axial_full_span": (24, 37),
}  # fmt: skip


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.filterwarnings("error::UserWarning:involution")  # "... is not folded"
@pytest.mark.parametrize("name", ATTENTION)
def test_folded_it_gives_the_same(name: str) -> None:
    make, side = ATTENTION[name]
    model, images = fitted(make().double(), side), torch.randn(1, 3, side, side, dtype=torch.float64)
    folded = involution.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-8, atol=1e-8)
    assert (norms(folded), norms(model)) == LEFT[name]


def one_layer_each() -> nn.Sequential:
    """(B, 3, 16, 16) -> (B, 3): a layer of every family, one after the other."""
    axial = AxialAttention(128, "width", 16, 3)
    nn.init.normal_(axial.relative, std=0.1)  # as the network does
    return nn.Sequential(
        AttentionStem(3, heads=8),
        LocalAttention(64, 3, 2, heads=8),
        LocalRelation(64, 3, 1, 1, group_channels=8),
        SelfAttention("patchwise", 64, 3),
        nn.Conv2d(16, 128, 1),
        AugmentedConvolution(128, 2, 4, halve=True),
        axial,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 3),
    )


CLOSE = {"rtol": 1e-3, "atol": 1e-3}


def test_as_onnx_every_layer_gives_the_same(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    model, images = fitted(one_layer_each(), 16), torch.randn(3, 3, 16, 16)
    export.export_onnx(model, tmp_path / "model.onnx", 16)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"images": images.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(images), **CLOSE)


@pytest.mark.parametrize("name", ["standalone", "pairwise"])
def test_exported_for_one_size_a_network_gives_the_same(name: str) -> None:
    make, side = ATTENTION[name]
    model, images = fitted(make(), side), torch.randn(3, 3, side, side)
    program = export.export_program(model, side)
    assert not any("involution" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), model(images), **CLOSE)


def test_a_size_is_asked_for_where_it_is_needed() -> None:
    for make, _ in (ATTENTION[name] for name in ("standalone", "patchwise", "axial")):
        with torch.device("meta"), pytest.raises(ValueError, match=r"one size only; say which \(--size 224"):
            export.export_program(make())
