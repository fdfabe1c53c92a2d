"""The authors' own RedNet-26 and -50, run in float64 on weights and images from a formula: ours gives the same numbers.

golden/released_rednet.npz keeps what their code printed: logits (first 50 classes), loss, norms of all gradients and
their products with the weights, statistics after the step, logits in evaluation.
"""

import runpy
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from involution import create_model, fold
from involution.weights import to_released

TOLERANCE = 1e-10  # 7e-12 measured with AVX-512
ROOT = Path(__file__).resolve().parents[1]
GOLDEN = np.load(ROOT / "tests" / "golden" / "released_rednet.npz")
SQUARED = (".conv2.conv2.conv.weight", ".stem.1.conv2.conv.weight")  # an involution squares its input: weaker kernels


def numbers(name: str, *shape: int) -> Tensor:
    """float64 in [-1, 1), of the name alone."""
    count = int(np.prod(shape, dtype=int))
    raw = np.random.Philox(key=zlib.crc32(name.encode())).random_raw(count)
    return torch.from_numpy((raw >> np.uint64(11)) * 2.0**-52 - 1.0).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """The value of one tensor of the released ``state_dict``."""
    if name.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    x = numbers(name, *shape)
    if len(shape) > 1:
        return x * (3 / x[0].numel()) ** 0.5 * (0.2 if name.endswith(SQUARED) else 1)
    if name.endswith("running_var"):
        return 1 + 0.5 * x
    return 0.1 * x if name.endswith(("running_mean", "bias")) else 1 + 0.5 * x


@pytest.fixture(scope="module", params=["rednet26", "rednet50"])
def converted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Tensor]]:
    """A released checkpoint of these weights, converted by the script, and back."""
    folder, name = tmp_path_factory.mktemp("released"), request.param
    names, shapes = GOLDEN[f"{name}/state_names"], GOLDEN[f"{name}/state_shapes"]  # 32x3x3x3; "" for a number
    state = {str(n): weight(n, tuple(map(int, s.split("x"))) if s else ()) for n, s in zip(names, shapes, strict=True)}
    torch.save({"state_dict": state}, folder / "released.pth")
    convert = runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"))["convert"]
    convert(folder / "released.pth", folder / "ours.safetensors")
    convert(folder / "ours.safetensors", folder / "again.pth", "released")
    again = torch.load(folder / "again.pth")["state_dict"]
    assert again.keys() == {key for key in state if "flatten_index" not in key}
    assert all(torch.equal(value, state[key]) for key, value in again.items())
    return name, load_file(folder / "ours.safetensors")


def model_of(name: str, state: dict[str, Tensor], layout: torch.memory_format) -> nn.Module:
    model = create_model(name).double()
    model.load_state_dict(state)
    return model.to(memory_format=layout)


def assert_golden(found: list[Tensor], key: str) -> None:
    """Relative to the largest value."""
    expected = torch.from_numpy(np.asarray(GOLDEN[key], dtype=np.float64))
    error = (torch.stack([f.detach() for f in found]) - expected).abs().max() / expected.abs().max()
    assert error < TOLERANCE, (key, float(error))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "channels_last"])
def test_the_released_code_to_the_last_digits(converted, layout):
    name, state = converted
    model = model_of(name, state, layout).train()
    images = numbers(f"images{name[6:]}", *(int(n) for n in GOLDEN[f"{name}/shape"])).contiguous(memory_format=layout)
    logits = model(images)
    loss = F.cross_entropy(logits, torch.arange(len(images)) * 37 % 1000)
    loss.backward()
    assert_golden(list(logits[:, :50]), f"{name}/logits")
    assert_golden([loss], f"{name}/loss")

    now = to_released(model.state_dict())
    gradients = to_released(model.state_dict() | {key: p.grad for key, p in model.named_parameters()})
    parameters = GOLDEN[f"{name}/parameters"]
    assert_golden([gradients[key].norm() for key in parameters], f"{name}/gradient_norms")
    assert_golden([(gradients[key] * now[key]).sum() for key in parameters], f"{name}/gradient_dot_weight")
    assert_golden([now[key].norm() for key in GOLDEN[f"{name}/statistics"]], f"{name}/statistics_norms")

    model.eval()
    with torch.no_grad():
        for network in (model, fold(model)):
            assert_golden(list(network(images)[:, :50]), f"{name}/eval_logits")
