"""Weights from elsewhere: other programs' checkpoints and prefixes, Paddle's files, published weights by name."""

import argparse
import collections
import hashlib
import logging
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from models_common import fitted
from omegaconf import OmegaConf
from PIL import Image
from programs import ROOT, in_process
from torch import Tensor

import involution
from involution import weights
from involution.models import load_model
from involution.weights import published
from involution.weights.source import _note

PATHS = Path("/somewhere/else"), Path("x").with_suffix(".y")


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return fitted(involution.create_model("rednet26", num_classes=1000), size=32)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a if "num_batches" not in k)


def attribute_dict(monkeypatch) -> type:
    """Lightning's class of hyper-parameters, under its name there."""
    module = types.ModuleType("lightning.pytorch.utilities.parsing")
    kind = type("AttributeDict", (dict,), {"__module__": module.__name__, "__qualname__": "AttributeDict"})
    module.AttributeDict = kind
    for name in ("lightning", "lightning.pytorch", "lightning.pytorch.utilities"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return kind


def test_records_of_other_programs_are_passed_over(monkeypatch, tmp_path):
    kind = attribute_dict(monkeypatch)
    state = {"a": torch.ones(2)}
    beside = {
        "args": argparse.Namespace(lr=0.1, output=PATHS[0], resume=PATHS[1], device=torch.device("cpu")),
        "metric": np.float64(75.9), "best": np.float32(3), "history": np.arange(3), "version": torch.__version__,
        "groups": collections.defaultdict(list, {"a": [1]}), "seen": {1, 2}, "kind": torch.float16, "z": 1j,
        "config": OmegaConf.create({"model": {"name": "rednet50", "sizes": [1, 2]}, "none": None}),
        "hyper_parameters": kind(lr=0.1, nested=kind(a=1)), "namespace": types.SimpleNamespace(a=1),
    }  # fmt: skip
    for legacy in (False, True):
        torch.save({"model": state, **beside}, tmp_path / "all.pth", _use_new_zipfile_serialization=not legacy)
        assert same(weights.read(tmp_path / "all.pth"), state)
    for name, value in beside.items():
        torch.save({"state_dict": state, name: value}, tmp_path / "one.ckpt")
        monkeypatch.delitem(sys.modules, "lightning.pytorch.utilities.parsing", raising=False)  # not installed here
        assert same(weights.read(tmp_path / "one.ckpt"), state), name
        monkeypatch.setitem(sys.modules, kind.__module__, types.SimpleNamespace(AttributeDict=kind))
    averaged = {"state_dict": {"a": torch.zeros(2)}, "state_dict_ema": state, "model_ema": None}
    torch.save(averaged, tmp_path / "timm.pth.tar")
    assert same(weights.read(tmp_path / "timm.pth.tar"), state)


@pytest.mark.parametrize("prefix", ["model.", "net.", "module.model.", "student._orig_mod.", "model.backbone."])
def test_a_wrapper_s_prefix_is_taken_off_and_said(prefix, tmp_path, caplog):
    network = involution.create_model("rednet26", num_classes=3)
    head = "model.head." if prefix.endswith("backbone.") else prefix
    state = {(head if k.startswith("fc.") else prefix) + k: v for k, v in network.state_dict().items()}
    torch.save({"state_dict": state | {"criterion.weight": torch.ones(3)}}, tmp_path / "wrapped.ckpt")
    assert same(load_model(tmp_path / "wrapped.ckpt").state_dict(), network.state_dict())
    said = prefix.replace("_orig_mod.", "").replace("backbone.", "")
    assert f"the prefix {said!r} is taken off" in caplog.text
    assert "criterion.weight" in caplog.text


def test_of_two_networks_none_is_guessed(tmp_path):
    state = involution.create_model("rednet26", num_classes=3).state_dict()
    both = {f"{who}.{key}": value for who in ("student", "teacher") for key, value in state.items()}
    torch.save(both, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"2 networks, whose names begin with 'student.' and 'teacher.'"):
        load_model(tmp_path / "two.pth")


def test_a_file_that_paddle_wrote():
    state = weights.read(Path(__file__).parent / "golden" / "tiny.pdparams")
    assert {tuple(value.shape) for value in state.values()} >= {(4, 3, 1, 1), (4, 2), (4,), (2,)}
    assert all(value.dtype == torch.float32 for value in state.values())


def test_a_pickle_that_names_code_is_refused_and_not_run(tmp_path):
    class Code:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "executed",)

    for value in (Code(), np.array([Code()], dtype=object)):
        (tmp_path / "evil.pdparams").write_bytes(pickle.dumps({"fc.weight": np.ones(2), "x": value}, protocol=4))
        with pytest.raises(ValueError, match="cannot be read as weights: besides weights it holds"):
            weights.read(tmp_path / "evil.pdparams")
    assert not (tmp_path / "executed").exists()


def write_paddle(model: torch.nn.Module, path: Path) -> Path:
    """A model's weights as PaddleClas has them."""
    state = {}
    for key, value in weights.to_released(model.state_dict()).items():
        key = key.removeprefix("backbone.").removeprefix("head.")
        key = key.replace("running_mean", "_mean").replace("running_var", "_variance")
        if not key.endswith("num_batches_tracked"):
            state[key] = value.numpy().T if key == "fc.weight" else value.numpy()
    state["StructuredToParameterName@@"] = {key: f"parameter_{i}" for i, key in enumerate(state)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(state, protocol=4))
    return path


@pytest.fixture
def elsewhere(model, tmp_path, monkeypatch) -> Path:
    """The publisher's RedNet-26, at an address of this machine."""
    file = write_paddle(model, tmp_path / "publisher" / "RedNet26_pretrained.pdparams")
    entry = published.PUBLISHED["rednet26"]._replace(url=file.as_uri())
    monkeypatch.setitem(published.PUBLISHED, "rednet26", entry)
    monkeypatch.setenv("INVOLUTION_CACHE", str(tmp_path / "cache"))
    return file


def test_published_weights_are_downloaded_once_and_serve_everywhere(model, elsewhere, tmp_path, capsys, caplog):
    caplog.set_level(logging.WARNING, "involution")  # as in a library, where nobody has set up a log
    assert same(involution.create_model("rednet26", pretrained=True).state_dict(), model.state_dict())
    told = capsys.readouterr().err
    assert "100%" in told, "a progress bar"
    assert "weights of PaddleClas" in told
    assert "licence Apache-2.0" in told
    cached = tmp_path / "cache" / "weights" / elsewhere.name
    expected = hashlib.sha256(elsewhere.read_bytes()).hexdigest()
    assert _note(cached).read_text() == f"{expected}  {elsewhere.name}\n"
    elsewhere.unlink()

    classifier = involution.load("rednet26")
    assert same(classifier.model.state_dict(), model.state_dict())
    assert classifier.class_names[217] == "English springer"
    ten = involution.create_model("rednet26", num_classes=10, pretrained="rednet26")
    assert torch.equal(ten.layer4[0].conv3.weight, model.layer4[0].conv3.weight)
    timm = pytest.importorskip("timm")
    assert same(timm.create_model("rednet26", pretrained=True).state_dict(), model.state_dict())
    features = timm.create_model("rednet26", pretrained=True, features_only=True, in_chans=1)
    assert torch.equal(features.layer4[0].conv3.weight, model.layer4[0].conv3.weight)
    assert not [m for m in features.modules() if "state_dict" in getattr(m, "pretrained_cfg", {})]
    hub = torch.hub.load(str(ROOT), "rednet26", source="local", pretrained=True)
    assert same(hub.state_dict(), model.state_dict())

    content = cached.read_bytes()
    cached.write_bytes(content[:-300] + bytes(1) + content[-299:])
    with pytest.raises(ValueError, match="is not the file that it was when it was first used"):
        involution.create_model("rednet26", pretrained=True)


def test_an_offline_machine_is_told_where_the_file_belongs(model, elsewhere, tmp_path):
    elsewhere.unlink()
    Image.new("RGB", (40, 40), "red").save(tmp_path / "photo.jpg")
    arguments = ["checkpoint=rednet26", f"images={tmp_path}/photo.jpg", "device=cpu"]
    finished = in_process("eval.py", *arguments, "data.val_size=32", "data.val_resize=32")
    assert finished.status == 2, finished.stderr
    place = tmp_path / "cache" / "weights" / "RedNet26_pretrained.pdparams"
    assert f"download it elsewhere and put it at {place}," in finished.stderr
    write_paddle(model, place)
    finished = in_process("eval.py", *arguments, "data.val_size=32", "data.val_resize=32")
    assert finished.status == 0, finished.stderr
    assert "licence Apache-2.0" in finished.stderr
    with Image.open(tmp_path / "photo.jpg") as photo:
        [[(name, _), *_]] = involution.load("rednet26", val_size=32, val_resize=32).predict([photo])
    assert f"%  {name}\n" in finished.stdout


def test_what_is_no_weights_is_not_kept(elsewhere, tmp_path):
    elsewhere.write_text("<html>log in first</html>")
    with pytest.raises(ValueError, match=r"is no file of weights: .*web page"):
        involution.create_model("rednet26", pretrained=True)
    assert not list((tmp_path / "cache" / "weights").glob("RedNet*"))
    with pytest.raises(ValueError, match="nobody has published weights of resnet50; there are some of rednet26"):
        involution.create_model("resnet50", pretrained=True)


def test_paddle_s_layout_gives_the_same_logits(model, tmp_path):
    images = torch.randn(2, 3, 64, 64)
    theirs = load_model(write_paddle(model, tmp_path / "RedNet26.pdparams")).eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(images), model(images), rtol=0, atol=0)
