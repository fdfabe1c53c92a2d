"""Both necks and heads overfit two photos of COCO, from nothing, at a fixed learning rate and with no step skipped."""

import io
import json
import os
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from involution import create_model

FEW = {"num_proposals": 50, "num_samples": 16, "box_width": 128}
CONVOLUTIONS = {"neck": "convolution", "head": "convolution", "pyramid_width": 64, **FEW}
INVOLUTIONS = {"neck": "involution", "head": "involution", **FEW}


@pytest.fixture(scope="module")
def photos():
    """Two photos of two to five objects each, with their boxes as masks too."""
    folder = os.environ.get("INVOLUTION_DATASETS")
    if not folder:
        pytest.skip("INVOLUTION_DATASETS names no folder with coco2017-mini-free.tar")
    with tarfile.open(Path(folder) / "coco2017-mini-free.tar") as tar:
        files = {member.name: member for member in tar.getmembers()}
        name = next(n for n in files if n.endswith("annotations/instances_train2017.json"))
        told = json.load(tar.extractfile(files[name]))
        category = {c["id"]: i for i, c in enumerate(told["categories"])}
        images, targets = [], []
        for image in told["images"]:
            own = [a for a in told["annotations"] if a["image_id"] == image["id"]]
            if not 2 <= len(own) <= 5 or any(a["iscrowd"] for a in own) or len(images) == 2:
                continue
            file = next(m for n, m in files.items() if n.endswith(f"train2017/{image['file_name']}"))
            with Image.open(io.BytesIO(tar.extractfile(file).read())) as picture:
                images.append(pil_to_tensor(picture.convert("RGB")))
            boxes = torch.tensor([a["bbox"] for a in own])
            boxes[:, 2:] += boxes[:, :2]
            masks = torch.zeros(len(own), *images[-1].shape[1:], dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist()):
                mask[y1:y2, x1:x2] = 1
            labels = torch.tensor([category[a["category_id"]] for a in own])
            targets.append({"boxes": boxes, "labels": labels, "masks": masks})
    return images, targets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options", "lr", "clip", "steps", "left"),
    [
        ("retinanet", {"neck": "convolution", "pyramid_width": 64}, 0.01, 40, 28, 0.7),
        ("faster_rcnn", CONVOLUTIONS, 0.005, 5, 50, 0.3),
        ("mask_rcnn", INVOLUTIONS, 0.02, 5, 50, 0.2),
    ],
)
def test_two_photos(photos, name, options, lr, clip, steps, left):
    """Involutions at the full learning rate and with the clipping of recipe=coco (complaint 1)."""
    torch.manual_seed(0)
    backbone = {"name": "rednet26", "freeze": None, "norm_eval": False}  # nothing is pre-trained
    model = create_model(name, backbone=backbone, min_size=64, max_size=96, **options).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 5)
        loss = sum(model(*photos).values())
        optimizer.zero_grad()
        loss.backward()
        assert torch.nn.utils.clip_grad_norm_(model.parameters(), clip).isfinite()
        optimizer.step()
        history.append(loss.item())
    assert sum(history[-3:]) / 3 < left * history[0], history
