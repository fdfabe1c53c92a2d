"""Exported models against the models they come from, at sizes and batches other than the example's."""

import os
import runpy
import sys
from pathlib import Path

import pytest
import torch
from models_common import fitted
from torch import nn

import involution
from involution import export
from involution.models import RedNet, load_model
from involution.ops import banded, involution2d, neighbourhood_product, span_involution2d, standard

ROOT = Path(__file__).resolve().parents[1]
SIZES = [(3, 3, 64, 64), (1, 3, 70, 65), (2, 3, 33, 90)]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A RedNet with one block a stage and 3x3 windows: every kind of layer, few nodes."""
    torch.manual_seed(0)
    return fitted(RedNet((1, 1, 1, 1), num_classes=5, kernel_size=3))


@pytest.mark.parametrize(("stride", "dilation", "size"), [(1, 1, 3), (2, 1, 7), (1, 2, 3), (3, 2, 5), (2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_decompositions_equal_the_operators(stride, dilation, size, dtype):
    torch.manual_seed(0)
    x = torch.randn(2, 12, 9, 14).to(dtype)
    height, width = -(-9 // stride), -(-14 // stride)
    padding = dilation * (size - 1) // 2
    kernel = torch.randn(2, 3, size, size, height, width).to(dtype)
    expected = involution2d(x, kernel, stride=stride, dilation=dilation)
    torch.testing.assert_close(standard.involution2d(x, kernel, stride, padding, dilation), expected)
    product = neighbourhood_product(expected, x, size, stride=stride, dilation=dilation, groups=3)
    found = standard.neighbourhood_product(expected, x, size, 3, stride, dilation)
    torch.testing.assert_close(found, product)


@pytest.mark.parametrize(
    ("size", "stride", "dilation", "height", "width"),
    [(7, 1, 1, 9, 15), (7, 2, 1, 7, 14), (3, 1, 1, 6, 5), (5, 3, 1, 8, 23), (5, 2, 2, 9, 9), (9, 1, 1, 5, 7)],
)
def test_the_banded_form_equals_the_fused_operator(size, stride, dilation, height, width):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 12, height, width), torch.randn(3 * size * size)
    reduced = torch.randn(2, 5, -(-height // stride), -(-width // stride))
    weight = torch.randn(3 * size * size, 5, 1, 1)
    with banded.wanted():
        assert banded.takes(x, size, stride, dilation)
    for b in (bias, None):
        found = banded.span_involution2d(x, reduced, weight, b, size, stride, dilation)
        expected = span_involution2d(x, reduced, weight, b, size, stride=stride, dilation=dilation)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_torch_program(model, tmp_path):
    model.train()
    export.export_torch(model, tmp_path / "model.pt2", class_names=["a cat", "b"])
    assert model.training
    assert not model.eval().training
    told = {"class_names": "", "val_size": "", "mean": ""}
    program = torch.export.load(tmp_path / "model.pt2", extra_files=told)
    assert (told["class_names"], told["val_size"], told["mean"]) == ("a cat\nb", "224", "0.485 0.456 0.406")
    assert not any("involution" in str(node.target) for node in program.graph.nodes)
    for size in SIZES:
        images = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images), model(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(AssertionError, match=r"33"):
        program.module()(torch.randn(1, 3, 32, 64))


def test_onnx(model, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    export.export_onnx(model, tmp_path / "model.onnx", class_names=["a", "b"])
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == ["images"]
    assert session.get_inputs()[0].shape[1] == 3
    told = session.get_modelmeta().custom_metadata_map
    assert (told["class_names"], told["val_resize"], told["std"]) == ("a\nb", "256", "0.229 0.224 0.225")
    for size in SIZES:
        images = torch.randn(size)
        [logits] = session.run(["logits"], {"images": images.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-4, atol=1e-4)


def small(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), involution.Involution2d(16, 3)]
    return fitted(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())).to(dtype)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float64, 1e-9)])
def test_torch_programs_of_other_types(dtype, tolerance, tmp_path):
    model, images = small(dtype), torch.randn(SIZES[1]).to(dtype)
    export.export_torch(model, tmp_path / "model.pt2")
    found = torch.export.load(tmp_path / "model.pt2").module()(images)
    torch.testing.assert_close(found, model(images), rtol=tolerance, atol=tolerance)


def test_onnx_of_other_types(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
    pytest.importorskip("onnxscript", reason="needs the export extra")
    model, images = small(torch.float16), torch.randn(SIZES[1]).half()
    export.export_onnx(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
    torch.testing.assert_close(found, model(images), rtol=2e-3, atol=2e-3)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=rf"no convolutions in the model's {dtype}; export model.float\(\)"):
            export.export_onnx(small(dtype), tmp_path / "other.onnx")


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_without_the_packages_for_onnx_it_names_them(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"ONNX needs {package}: pip install onnx onnxscript onnxruntime"):
        export.export_onnx(small(torch.float32), tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("write", "suffix"), [(export.export_onnx, ".onnx"), (export.export_torch, ".pt2"), (export.export_aoti, ".pt2")]
)
def test_a_file_that_cannot_be_written_is_named_before_the_work(write, suffix, tmp_path):
    (tmp_path / f"folder{suffix}").mkdir()
    for name, message in (
        ("model.so", rf"path is .*model.so; it should end with \{suffix}"),
        (f"none/model{suffix}", r"cannot be written \(No such file or directory\); name another file"),
        (f"folder{suffix}", r"cannot be written \(Is a directory\); name another file"),
    ):
        with pytest.raises(ValueError, match=message):
            write(nn.Conv2d(3, 3, 1), tmp_path / name)
    with pytest.raises(ValueError, match="size is 0; it should be an integer of at least 1"):
        export.export_program(nn.Conv2d(3, 3, 1), 0)
    assert [path.name for path in tmp_path.iterdir()] == [f"folder{suffix}"]


def test_safetensors_with_a_model_card(tmp_path):
    model = involution.create_model("rednet26", num_classes=3, kernel_size=5)
    export.save_safetensors(model, tmp_path / "hub", ["cat", "dog", "newt"], "Trained on nothing.")
    again = load_model(tmp_path / "hub" / "model.safetensors")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    card = (tmp_path / "hub" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit")
    assert "Trained on nothing." in card
    assert "2. newt" in card
    code = card.split("```python\n")[1].split("```")[0]
    scope: dict = {}
    previous = Path.cwd()
    os.chdir(tmp_path / "hub")
    try:
        exec(code, scope)
    finally:
        os.chdir(previous)
    assert torch.equal(scope["model"].fc.weight, model.fc.weight)
    with pytest.raises(ValueError, match="class_names has 1 names; the model has 3 classes"):
        export.save_safetensors(model, tmp_path, ["cat"])
    export.save_safetensors(model.bfloat16(), tmp_path / "cast")
    again = load_model(tmp_path / "cast" / "model.safetensors")
    assert all(
        torch.equal(v.to(again.state_dict()[k].dtype), again.state_dict()[k]) for k, v in model.state_dict().items()
    )
    with pytest.raises(ValueError, match=r"README.md cannot be a folder \(File exists\); weights and card go into one"):
        export.save_safetensors(model, tmp_path / "cast" / "README.md")


@pytest.mark.parametrize(
    ("checkpoint", "out", "error"),
    [
        ("model.pt", "out", None),
        ("none.pt", "out", "there is no file"),
        ("model.pt", "none/out.onnx", "there is no folder"),
    ],
)
def test_the_script(tmp_path, monkeypatch, capsys, checkpoint, out, error):
    torch.save(involution.create_model("resnet26", num_classes=2).state_dict(), tmp_path / "model.pt")
    script = runpy.run_path(str(ROOT / "scripts" / "export.py"))
    command = ["export.py", str(tmp_path / checkpoint), str(tmp_path / out), "--format", "safetensors"]
    monkeypatch.setattr(sys, "argv", command)
    if error:
        assert script["main"]() == 2
        assert capsys.readouterr().err.startswith(f"error: {error}")
    else:
        assert script["main"]() == 0
        assert load_model(tmp_path / "out" / "model.safetensors").num_classes == 2
