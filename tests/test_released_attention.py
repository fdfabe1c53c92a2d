"""SAN and Axial ResNet against the authors' own results, and their files in (tests/golden/released_attention.npz).

The weights and images follow from a formula, so that the file holds results only. They were computed by the authors'
code in float64.
"""

import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from programs import in_process
from torch import Tensor

import involution
from involution.models import load_model
from involution.weights import describe, to_ours

GOLDEN = Path(__file__).parent / "golden" / "released_attention.npz"
NAMES = ("san10_pairwise", "san10_patchwise", "axial_resnet26s")


def numbers(name: str, count: int) -> np.ndarray:
    """float64 in [-1, 1), by name."""
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-52 - 1.0


def weight(key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor that the authors' code was given under this name."""
    if key.endswith(("num_batches_tracked", "flatten_index")):
        return torch.zeros(shape, dtype=torch.long)
    x = torch.from_numpy(numbers(key, int(np.prod(shape)))).reshape(shape)
    if len(shape) > 1:
        return x * (3 / x[0].numel()) ** 0.5
    if key.endswith(("running_mean", "bias")):
        return 0.1 * x
    return 1 + 0.5 * x


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN))


def released(golden: dict[str, np.ndarray], name: str) -> dict[str, Tensor]:
    """The released state dict."""
    keys, shapes = (golden[f"{name}/state_{what}"].tolist() for what in ("names", "shapes"))
    return {k: weight(k, tuple(int(n) for n in s.split("x") if n)) for k, s in zip(keys, shapes, strict=True)}


@pytest.mark.parametrize("name", NAMES)
def test_results_are_the_authors(name: str, golden: dict[str, np.ndarray]) -> None:
    """Logits, loss, every gradient's norm and the logits of an evaluation afterwards, to 1e-9."""
    state, shape = released(golden, name), tuple(golden[f"{name}/shape"])
    model = involution.create_model(name).double()
    model.load_state_dict(to_ours(state))
    images = torch.from_numpy(numbers(f"images {name}", int(np.prod(shape)))).reshape(shape)
    if name == "san10_pairwise":
        model, images = (x.to(memory_format=torch.channels_last) for x in (model, images))
    logits = model.train(name != "axial_resnet26s")(images)
    loss = F.cross_entropy(logits, torch.arange(shape[0]) * 37 % 1000)
    loss.backward()
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(logits[:, :50], torch.from_numpy(golden[f"{name}/logits"]), **close)
    assert abs(loss.item() - golden[f"{name}/loss"]) < 1e-9
    norms = dict(zip(golden[f"{name}/parameters"].tolist(), golden[f"{name}/gradient_norms"], strict=True))
    own = dict(model.named_parameters())
    assert len(own) == len(norms)
    renamed = dict(zip((k for k in state if "flatten" not in k), to_ours(state), strict=True))
    found = torch.stack([own[renamed[key]].grad.norm() for key in norms])
    torch.testing.assert_close(found, torch.tensor(list(norms.values()), dtype=torch.float64), **close)
    with torch.no_grad():
        again = model.eval()(images)[:, :50]
    torch.testing.assert_close(again, torch.from_numpy(golden[f"{name}/eval_logits"]), **close)


def test_released_files_are_loaded(golden: dict[str, np.ndarray], tmp_path: Path) -> None:
    """As the authors save them: nested, with a prefix, beside an optimizer; by every door."""
    for name, nest, prefix in (("san10_pairwise", "state_dict", "module."), ("axial_resnet26s", "net", "module.")):
        state, file = released(golden, name), tmp_path / f"{name}.pth"
        floats = {prefix + key: value.float() for key, value in state.items() if value.is_floating_point()}
        torch.save({"epoch": 1, nest: floats}, file)
        model = involution.create_model(name, pretrained=file)
        expected = {key: value.float() for key, value in to_ours(state).items() if value.is_floating_point()}
        assert all(torch.equal(model.state_dict()[key], value) for key, value in expected.items())
        found = load_model(file)
        assert type(found) is type(model)
        small = involution.create_model(name, num_classes=7, pretrained=file)  # a fresh classifier
        assert torch.equal(small.state_dict()["stem.conv1.weight"], expected["stem.conv1.weight"])
    converted = tmp_path / "ours.safetensors"
    finished = in_process("scripts/convert_checkpoint.py", str(tmp_path / "san10_pairwise.pth"), str(converted))
    assert finished.status == 0, finished.stderr
    assert "san10_pairwise (num_classes=1000, in_chans=3)" in finished.stdout
    model, again = load_model(tmp_path / "san10_pairwise.pth"), load_model(converted)  # ours are not permuted again
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    finished = in_process("scripts/convert_checkpoint.py", str(converted), str(tmp_path / "x.pth"), "--to", "released")
    assert finished.status == 2
    assert "san10_pairwise" in finished.stderr


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("san19_patchwise", {}),
        ("standalone_resnet38", {"heads": 4, "kernel_size": 5}),
        ("lrnet26", {"group_channels": 4}),
        ("aa_resnet50", {"image_size": 320}),
        ("axial_resnet_m", {}),
        ("axial_resnet26s", {"image_size": 128}),
    ],
)
def test_models_are_told_by_their_weights(name: str, options: dict[str, int]) -> None:
    with torch.device("meta"):
        state = involution.create_model(name, num_classes=7, in_chans=1, **options).state_dict()
    assert describe(to_ours(state)) == (name, {"num_classes": 7, "in_chans": 1, **options})
