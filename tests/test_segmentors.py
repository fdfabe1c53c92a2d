"""Semantic FPN and UPerNet: shapes of any size, what they return, gradients everywhere."""

import pytest
import torch

from involution import create_model


@pytest.mark.parametrize(
    ("name", "backbone", "neck", "losses"),
    [
        ("semantic_fpn", "rednet26", "involution", {"out"}),
        ("semantic_fpn", "resnet26", "convolution", {"out"}),
        ("upernet", "rednet26", "involution", {"out", "aux"}),
    ],
)
def test_any_size_and_every_gradient(name, backbone, neck, losses):
    model = create_model(name, num_classes=5, backbone={"name": backbone}, neck=neck).train()
    for size in ((65, 97), (64, 64)):
        logits = model(torch.randn(2, 3, *size))
        assert set(logits) == losses
        assert logits["out"].shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    sum(x.square().mean() for x in logits.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 3, 33, 40)).shape == (1, 5, 9, 10)


def test_wrong_options():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="neck is 'involutions'"):
            create_model("upernet", neck="involutions")
        with pytest.raises(ValueError, match="did you mean 'neck'"):
            create_model("semantic_fpn", necks="involution")
        with pytest.raises(ValueError, match="semantic_fpn"):
            create_model("semanticfpn")
