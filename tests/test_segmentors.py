"""Semantic FPN and UPerNet: shapes of any size, what they return, gradients everywhere, which weights fit."""

import pytest
import torch

from involution import create_model
from involution.weights import load_into


@pytest.mark.parametrize(
    ("name", "backbone", "neck", "losses"),
    [
        ("semantic_fpn", "rednet26", "involution", {"out"}),
        ("semantic_fpn", "resnet26", "convolution", {"out"}),
        ("upernet", "rednet26", "involution", {"out", "aux"}),
    ],
)
def test_any_size_and_every_gradient(name, backbone, neck, losses):
    """Complaint 4, segmentation."""
    model = create_model(name, num_classes=5, backbone={"name": backbone}, neck=neck).train()
    logits = model(torch.randn(2, 3, 33, 49))
    assert set(logits) == losses
    assert logits["out"].shape == (2, 5, 9, 13)
    sum(x.square().mean() for x in logits.values()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    with torch.inference_mode():
        assert model.eval()(torch.randn(1, 3, 32, 40)).shape == (1, 5, 8, 10)


@pytest.mark.parametrize("name", ["semantic_fpn", "upernet"])
def test_weights_for_other_classes_leave_the_classifier_fresh(name, caplog):
    with torch.device("meta"):
        model, other, necks = (
            create_model(name, num_classes=n, backbone="rednet26", neck=neck)
            for n, neck in ((5, "convolution"), (7, "convolution"), (7, "involution"))
        )
    load_into(model, other.state_dict())
    assert "the weights have no classifier for 5 classes: it starts afresh" in caplog.text
    with pytest.raises(ValueError, match="of another model; missing: "):
        load_into(model, necks.state_dict())


def test_wrong_options():
    with torch.device("meta"):
        with pytest.raises(ValueError, match="neck is 'involutions'"):
            create_model("upernet", neck="involutions")
        with pytest.raises(ValueError, match="did you mean 'neck'"):
            create_model("semantic_fpn", necks="involution")
        with pytest.raises(ValueError, match="semantic_fpn"):
            create_model("semanticfpn")
