"""A whole network in bfloat16 on the CPU: as exact as with involution by the plain reference, in torch's operations.

Both are far from float64, as networks of this depth are (ResNet-26, all torch's layers: gradients 0.20 to 0.24).
Relative errors of ours and of the reference with three seeds, in evaluation and training: logits 0.024 to 0.059 and
0.019 to 0.059, ours at most 1.24 times as large (40 numbers); gradients of parameters 0.32 to 0.41, at most 1.04 times.
"""

import copy

import pytest
import torch
from models_common import fitted
from torch import Tensor, nn

import involution


def outcome(model: nn.Module, images: Tensor, weights: Tensor, autocast: bool = False) -> list[Tensor]:
    """Logits (B, N), the gradients of all parameters in a row, and of the images (B, 3, H, W)."""
    images = images.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
    gradients = torch.autograd.grad((logits.to(weights) * weights).sum(), [*model.parameters(), images])
    return [logits.double(), torch.cat([g.double().flatten() for g in gradients[:-1]]), gradients[-1].double()]


@pytest.mark.parametrize("cast", [False, True], ids=["autocast", "cast"])
def test_errors_are_those_of_the_reference(cast, monkeypatch):
    torch.manual_seed(0)
    model = fitted(involution.create_model("rednet26", num_classes=10)).train()
    images, weights = torch.randn(4, 3, 64, 64), torch.randn(4, 10)
    exact = outcome(copy.deepcopy(model).double(), images.double(), weights)
    dtype = torch.bfloat16 if cast else torch.float32

    def errors() -> list[float]:
        found = outcome(copy.deepcopy(model).to(dtype), images.to(dtype), weights, autocast=not cast)
        return [((f - e).norm() / e.norm()).item() for f, e in zip(found, exact, strict=True)]

    ours = errors()
    monkeypatch.setenv("INVOLUTION_BACKEND", "reference")
    reference = errors()
    assert ours[0] < 1.5 * reference[0]
    assert ours[1] < 1.1 * reference[1]
    assert ours[2] < 1.1 * reference[2]
