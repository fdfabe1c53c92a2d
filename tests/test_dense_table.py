"""Parameters and FLOPs of Tables 3, 4, 5 and 7 to the printed digit."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "dense_table.py"


@pytest.fixture(scope="module")
def measure():
    spec = importlib.util.spec_from_file_location("dense_table", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure


def figures(row):
    """Parameters and trainable parameters in M, all FLOPs and those that the paper counted in G."""
    ours = row.ours
    return round(ours.params / 1e6, 3), round(ours.trainable / 1e6, 3), round(row.printed / 1e9, 2)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (("retinanet", "resnet50", "convolution", "convolution"), (37.969, 37.743, 239.32)),
        (("retinanet", "rednet50", "involution", "convolution"), (26.385, 26.246, 199.90)),
        (("faster_rcnn", "rednet50", "convolution", "convolution"), (31.742, 31.603, 177.87)),
        (("faster_rcnn", "rednet50", "involution", "convolution"), (29.651, 29.512, 135.03)),
        (("faster_rcnn", "rednet50", "involution", "involution"), (29.129, 28.990, 91.55)),
        (("mask_rcnn", "resnet50", "convolution", "convolution"), (44.401, 44.175, 253.39)),
        (("mask_rcnn", "rednet50", "involution", "convolution"), (32.295, 32.156, 181.33)),
        (("mask_rcnn", "rednet50", "involution", "involution"), (29.682, 29.543, 104.66)),
    ],
)
def test_table_3(measure, model, expected):
    name, backbone, neck, head = model
    assert figures(measure(name, backbone, neck=neck, head=head)) == expected


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (("semantic_fpn", "resnet50", "convolution"), (28.498, 28.498, 362.75)),
        (("semantic_fpn", "rednet50", "convolution"), (18.463, 18.463, 293.87)),
        (("semantic_fpn", "rednet50", "involution"), (16.373, 16.373, 205.09)),
        (("upernet", "resnet50", "convolution"), (66.415, 66.415, 1894.45)),
        (("upernet", "rednet50", "convolution"), (56.380, 56.380, 1825.57)),
    ],
)
def test_tables_4_and_5(measure, model, expected):
    name, backbone, neck = model
    assert figures(measure(name, backbone, neck=neck)) == expected


@pytest.mark.parametrize(
    ("plugin", "trainable", "printed", "products"),
    [
        ("nl", 46.277, 261.8, 16.4),
        ("rcca", 45.487, 263.9, 1.2),
        ("gc", 45.762, 253.4, 0.0),
        ("dcn_v2", 44.549, 253.8, 0.0),
    ],
)
def test_table_7(measure, plugin, trainable, printed, products):
    row = measure("mask_rcnn", "resnet50", plugin=plugin)
    bare = measure("mask_rcnn", "resnet50", plugin=None)
    assert round(row.ours.trainable / 1e6, 3) == trainable
    assert round(row.printed / 1e9, 1) == printed
    left_out = bare.ours.flops - bare.printed
    assert round((row.ours.flops - row.printed - left_out) / 1e9, 1) == products
