"""Released detectors and segmentors: their names and values, there and back."""

import pytest
import torch
from programs import in_process

import involution
from involution import create_model
from involution.export import export_program
from involution.models import load_model, without_weights
from involution.weights import dense, open_weights

INVOLUTION = ("conv1.conv.weight", "conv1.bn.running_var", "conv2.conv.bias")
NECK = [f"neck.fpn_convs.{i}.{inner}" for i in range(3) for inner in INVOLUTION] + ["neck.lateral_convs.2.conv.bias"]
ROWS = {
    ("retinanet", "rednet26", "involution", None): [
        *NECK, "neck.fpn_convs.4.conv.weight", "bbox_head.cls_convs.3.conv.weight", "bbox_head.reg_convs.0.conv.bias",
        "bbox_head.retina_cls.weight", "bbox_head.retina_reg.bias", "backbone.stem.1.conv2.conv.weight",
    ],
    ("retinanet", "resnet26", "convolution", None): [
        "bbox_head.reg_convs.3.conv.weight", "bbox_head.cls_convs.0.gn.bias",
    ],
    ("faster_rcnn", "resnet26", "convolution", "convolution"): [
        "backbone.conv1.weight", "backbone.bn1.running_mean", "backbone.layer4.0.downsample.0.weight",
        "neck.fpn_convs.3.conv.weight", "rpn_head.rpn_conv.weight", "rpn_head.rpn_cls.bias", "rpn_head.rpn_reg.weight",
    ],
    ("mask_rcnn", "rednet26", "involution", "involution"): [
        *NECK, *(f"rpn_head.rpn_conv.{inner}" for inner in INVOLUTION), "neck.fpn_convs.3.conv2.conv.weight",
        *(f"roi_head.mask_head.convs.{i}.0.{inner}" for i in range(4) for inner in INVOLUTION),
        "roi_head.bbox_head.shared_fcs.1.weight", "roi_head.bbox_head.fc_cls.weight", "roi_head.bbox_head.fc_reg.bias",
        "roi_head.mask_head.upsample.weight", "roi_head.mask_head.conv_logits.weight",
    ],
    ("semantic_fpn", "resnet26", "convolution", None): [
        "backbone.stem.0.weight", "backbone.stem.7.running_var", "decode_head.scale_heads.3.4.conv.weight",
        "decode_head.scale_heads.0.0.bn.weight", "decode_head.conv_seg.weight",
    ],
    ("upernet", "rednet26", "convolution", None): [
        "decode_head.psp_modules.3.1.conv.weight", "decode_head.bottleneck.bn.bias", "auxiliary_head.conv_seg.bias",
        "decode_head.lateral_convs.2.conv.weight", "decode_head.fpn_convs.0.bn.weight",
        "auxiliary_head.convs.0.conv.weight", "decode_head.fpn_bottleneck.conv.weight",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("row", "names"), ROWS.items(), ids=lambda value: value[0])
def test_names_there_and_back(row, names):
    name, backbone, neck, head = row
    options = {"backbone": {"name": backbone}, "neck": neck} | ({"head": head} if head else {})
    options |= {"head_norm": neck == "convolution"} if name == "retinanet" else {}
    with torch.device("meta"):
        model = create_model(name, num_classes=7, **options)
    state = model.state_dict()
    released = dense.to_released(state)
    assert len(released) == len(state)
    assert [key for key in names if key not in released] == []
    assert not [
        key for key in released if "kernel_generation" in key or key.startswith(("head.", "proposals", "regions"))
    ]
    back = dense.to_ours(released)
    assert {key: value.shape for key, value in back.items()} == {key: value.shape for key, value in state.items()}
    told = dense.describe(released)
    assert (told["name"], told["num_classes"], told["neck"], told.get("head")) == (name, 7, neck, head)
    with torch.device("meta"):
        assert create_model(**told).state_dict().keys() == state.keys()
    assert dense.describe(state) == told  # under our names too


def test_a_file_says_how_many_convolutions_retinanet_s_towers_have():
    with torch.device("meta"):
        state = create_model("retinanet", num_classes=7, backbone="rednet26", stacked_convs=2).state_dict()
        told = dense.describe(dense.to_released(state))
        assert create_model(**told).state_dict().keys() == state.keys()
    assert told["stacked_convs"] == 2


def test_a_released_detector_with_its_background_last(tmp_path):
    torch.manual_seed(0)
    model = create_model("mask_rcnn", num_classes=3, backbone="rednet26", neck="involution")
    state = model.state_dict()
    released = dense.to_released(state)
    assert released["roi_head.bbox_head.fc_reg.weight"].shape == (12, 1024)
    assert released["roi_head.mask_head.conv_logits.bias"].shape == (3,)
    scores = state["regions.box_predictor.cls_score.weight"]
    assert torch.equal(released["roi_head.bbox_head.fc_cls.weight"], torch.cat([scores[1:], scores[:1]]))
    torch.save({"meta": {"epoch": 12}, "state_dict": released}, tmp_path / "released.pth")
    loaded = load_model(tmp_path / "released.pth").state_dict()
    read = {key for key in state if not key.startswith(("regions.box_predictor.bbox", "regions.mask_predictor.mask"))}
    assert all(torch.equal(loaded[key], state[key]) for key in read)
    assert torch.equal(
        loaded["regions.box_predictor.bbox_pred.weight"][4:], state["regions.box_predictor.bbox_pred.weight"][4:]
    )
    assert not loaded["regions.box_predictor.bbox_pred.weight"][:4].any()
    converted, again = str(tmp_path / "ours.safetensors"), str(tmp_path / "again.pth")
    for words in ((str(tmp_path / "released.pth"), converted), (converted, again, "--to", "released")):
        finished = in_process("scripts/convert_checkpoint.py", *words)
        assert finished.status == 0, finished.stderr
        assert "mask_rcnn" in finished.stdout
    assert type(load_model(converted)) is type(model)
    back = torch.load(again)["state_dict"]
    assert all(torch.equal(back[key], value) for key, value in released.items())
    with pytest.raises(ValueError, match=r"weights of a mask_rcnn, no classifier: involution\.models\.load_model"):
        involution.load(converted)
    with pytest.raises(ValueError, match="MaskRCNN cannot be exported: how many boxes survive depends"):
        export_program(model)
    backbone = create_model("rednet26", num_classes=0, stem_kernel_size=7, pretrained=tmp_path / "released.pth")
    assert torch.equal(backbone.layer4[0].conv1.weight, state["backbone.layer4.0.conv1.weight"])
    other = create_model(
        "mask_rcnn", num_classes=4, backbone="rednet26", neck="involution", pretrained=tmp_path / "released.pth"
    ).state_dict()  # what is about the classes starts afresh
    assert other["regions.box_predictor.cls_score.weight"].shape == (5, 1024)
    assert torch.equal(other["regions.box_head.fc7.weight"], state["regions.box_head.fc7.weight"])
    assert open_weights(tmp_path / "released.pth").describe()["backbone"]["stem_kernel_size"] == 7


def test_a_trained_model_needs_no_file_of_weights_again():
    told = {
        "name": "faster_rcnn",
        "pretrained": "a",
        "backbone": {"name": "rednet50", "pretrained": "b", "kernel_size": 5},
    }
    assert without_weights(told) == {"name": "faster_rcnn", "backbone": {"name": "rednet50", "kernel_size": 5}}
