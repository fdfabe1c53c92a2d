"""The self-attention families folded, exported, and as ONNX: the smallest network of each, against itself."""

from pathlib import Path

import pytest
import torch
from models_common import fitted
from torch import nn

import involution
from involution import export
from involution.models.aa import AAResNet
from involution.models.axial import AxialResNet
from involution.models.lrnet import LRNet
from involution.models.san import SAN
from involution.models.standalone import StandAloneResNet

ONE = (1, 1, 1, 1)
#: network, side of its images, BatchNorms that fold leaves of how many
FAMILIES = {
    "standalone": (lambda: StandAloneResNet(ONE, 3, kernel_size=3), 33, (5, 17)),
    "lrnet": (lambda: LRNet(ONE, (64, 128, 256, 512), 3, kernel_size=3), 33, (5, 18)),
    "pairwise": (lambda: SAN("pairwise", (1, *ONE), 3), 130, (25, 26)),
    "patchwise": (lambda: SAN("patchwise", (1, *ONE), 3), 130, (25, 26)),
    "aa": (lambda: AAResNet(ONE, 3, image_size=64), 64, (3, 17)),
    "axial": (lambda: AxialResNet(ONE, 0.5, "axial", 3), 33, (42, 61)),
    "axial_full_span": (lambda: AxialResNet(ONE, 0.5, "convolution", 3, span=None, image_size=64), 64, (24, 37)),
}


def norms(model: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())


@pytest.mark.filterwarnings("error::UserWarning:involution")  # "... is not folded"
@pytest.mark.parametrize("name", FAMILIES)
def test_folded_it_gives_the_same(name: str) -> None:
    make, side, left = FAMILIES[name]
    model, images = fitted(make().double(), side), torch.randn(1, 3, side, side, dtype=torch.float64)
    folded = involution.fold(model)
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-8, atol=1e-8)
    assert (norms(folded), norms(model)) == left


@pytest.mark.parametrize("name", FAMILIES)
def test_exported_for_one_size_it_gives_the_same(name: str, tmp_path: Path) -> None:
    make, side, _ = FAMILIES[name]
    model, images = fitted(make(), side), torch.randn(3, 3, side, side)
    with torch.no_grad():
        expected = model(images)
    close = {"rtol": 1e-3, "atol": 1e-3}
    program = export.export_program(model, side)
    assert not any("involution" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(images), expected, **close)
    if name in ("pairwise", "axial"):  # one member a family: ONNX takes long
        return
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    export.export_onnx(model, tmp_path / "model.onnx", side)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    [logits] = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, **close)


def test_a_size_is_asked_for_where_it_is_needed() -> None:
    for make, _, _ in (FAMILIES[name] for name in ("standalone", "patchwise", "axial")):
        with torch.device("meta"), pytest.raises(ValueError, match=r"one size only; say which \(size=224\)"):
            export.export_program(make())
