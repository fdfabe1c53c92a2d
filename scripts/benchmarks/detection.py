"""Faster R-CNN: RedNet-50 with involutions in neck and head against the ResNet-50 row, and that row against
torchvision's fasterrcnn_resnet50_fpn: inference and a training step on photos of COCO, interleaved. And how long COCO's
scores take for as many images and detections as COCO's validation has.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import timing
from benchmarks.networks import fit_statistics, rounds
from benchmarks.report import Report, Row
from involution import create_model

REDNET, RESNET, TORCHVISION = "RedNet-50, involution", "ResNet-50", "torchvision"
Sample = tuple[Tensor, dict[str, Tensor]]


def photos(folder: Path | None, n: int, quick: bool) -> list[Sample]:
    """The first ``n`` photos with objects of a folder in COCO's layout, or noise with boxes: images, boxes, labels."""
    if folder is None:
        generator = torch.Generator().manual_seed(0)
        height, width = (64, 96) if quick else (480, 640)
        boxes = torch.tensor([[0.1, 0.1, 0.5, 0.6], [0.4, 0.3, 0.9, 0.8]]) * torch.tensor([width, height] * 2)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2])}
        return [(torch.rand(3, height, width, generator=generator), target) for _ in range(n)]
    from torchvision.io import ImageReadMode, decode_image

    told = json.loads((folder / "annotations" / "instances_val2017.json").read_text())
    category = {c["id"]: i for i, c in enumerate(sorted(told["categories"], key=lambda c: c["id"]))}
    samples: list[Sample] = []
    for image in told["images"]:
        own = [a for a in told["annotations"] if a["image_id"] == image["id"] and not a.get("iscrowd")]
        if own and len(samples) < n:
            boxes = torch.tensor([a["bbox"] for a in own], dtype=torch.float32)
            boxes[:, 2:] += boxes[:, :2]
            labels = torch.tensor([category[a["category_id"]] for a in own])
            pixels = decode_image(str(folder / "val2017" / image["file_name"]), ImageReadMode.RGB)
            samples.append((pixels.float() / 255, {"boxes": boxes, "labels": labels}))
    return samples


def detectors(args: argparse.Namespace) -> dict[str, nn.Module]:
    """The three, all with the sizes, the classes and the frozen parts of the paper's."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

    low, high = (64, 96) if args.quick else (800, 1333)
    size: dict[str, Any] = {"min_size": low, "max_size": high}
    torch.manual_seed(0)
    models: dict[str, nn.Module] = {
        REDNET: create_model("faster_rcnn", backbone="rednet50", neck="involution", head="involution", **size),
        RESNET: create_model("faster_rcnn", backbone="resnet50", **size),
        # what fasterrcnn_resnet50_fpn makes of pre-trained weights; without them it would train every layer
        TORCHVISION: FasterRCNN(
            resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3), 81, **size
        ),
    }
    for model in models.values():
        model.to(args.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return models


def inference(model: nn.Module, samples: list[Sample], device: str) -> Callable[[], Any]:
    images = [image.to(device) for image, _ in samples]

    def call() -> Any:
        model.eval()
        with torch.inference_mode():
            return [model([image]) for image in images]

    return call


def training_step(model: nn.Module, samples: list[Sample], device: str, first_label: int) -> Callable[[], None]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9, weight_decay=1e-4)
    images = [image.to(device) for image, _ in samples]
    targets = [{"boxes": t["boxes"].to(device), "labels": t["labels"].to(device) + first_label} for _, t in samples]

    def step() -> None:
        model.train()
        sum(model(images, targets).values()).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 5)
        optimizer.step()
        optimizer.zero_grad()

    return step


def scoring(n: int) -> Row:
    """Processor time of scores of ``n`` images: COCO's 7.36 objects each, and the most detections it counts, 100."""
    from data.coco import CocoImages
    from data.image_list import Names
    from involution.engine.tasks.average_precision import Found, average_precision

    random = np.random.default_rng(0)
    counts = random.poisson(7.36, n)
    m, first = counts.sum(), np.concatenate([[0], counts.cumsum()])
    boxes = np.concatenate([random.random((m, 2)) * (400, 300), random.random((m, 2)) ** 2 * 240 + 4], axis=1)
    truth = CocoImages(
        Names.pack(b"" for _ in range(n)), np.arange(n), np.tile(np.array([480, 640], np.int32), (n, 1)), first, boxes,
        boxes[:, 2:].prod(1), random.integers(80, size=m).astype(np.int32), np.zeros(m, bool),
        Names.pack(b"" for _ in range(m)), np.arange(80), tuple(map(str, range(80))),
    )  # fmt: skip
    found = []
    for i in range(n):  # every object, a little off, and other places and classes beside
        own = random.integers(first[i], first[i + 1], 100) if counts[i] else random.integers(0, m, 100)
        corners = boxes[own] + random.normal(0, 8, (100, 4))
        corners[:, 2:] = corners[:, :2] + corners[:, 2:].clip(1)
        labels = np.where(random.random(100) < 0.5, truth.labels[own], random.integers(80, size=100)).astype(np.int32)
        scores = random.random(100).astype(np.float32)
        found.append(Found(i, corners.astype(np.float32), scores, labels))
    begin = time.process_time()
    ap = average_precision(truth, found)["ap"]
    seconds = time.process_time() - begin
    return {"images": n, "objects": int(m), "detections": 100 * n, "AP (%)": ap, "processor time (s)": seconds}


def run(args: argparse.Namespace, report: Report) -> None:
    samples = photos(args.coco, args.images, args.quick)
    models = detectors(args)
    for name in (REDNET, RESNET):  # one detects with a backbone that has been pre-trained
        backbone: Any = models[name].backbone
        fit_statistics(backbone, torch.randn(2, 3, 128, 128, device=args.device))
    source = "noise" if args.coco is None else "photos of COCO"
    settings = f"{len(samples)} {source}, 800 to 1333 pixels, fp32" if not args.quick else "tiny"
    calls = {name: inference(model, samples, args.device) for name, model in models.items()}
    found = timing.interleave(calls, args.repeats, args.device)
    note = "One image at a time, with resizing, proposals and suppression; the weights are untrained."
    report.table(f"Inference, {settings}", [row(found)], note)
    calls = {
        name: training_step(model, samples, args.device, int(name == TORCHVISION)) for name, model in models.items()
    }
    found = timing.interleave(calls, rounds(args), args.device)
    note = (
        f"{rounds(args)} rounds of forward, backward, clipping, SGD; stem and first stage frozen. torchvision's "
        "label 0 is the background."
    )
    report.table(f"Training step, {settings}", [row(found)], note)
    note = "Boxes drawn at random, in memory; the whole time between the last image and the scores, on all threads."
    report.table("COCO's scores", [scoring(50 if args.quick else 5000)], note)


def row(samples: timing.Samples) -> Row:
    """Times in ms and the two ratios that count."""
    result: Row = {f"{name} (ms)": timing.ms(samples, name) for name in samples}
    result["ResNet-50 / RedNet-50"] = timing.ratio(samples, RESNET, REDNET)
    result["ResNet-50 / torchvision"] = timing.ratio(samples, RESNET, TORCHVISION)
    return result


def add_command(commands: Any, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser("detection", parents=[common], help="the detectors", description=__doc__)
    parser.add_argument("--coco", type=Path, metavar="FOLDER", help="with val2017/ and annotations/ (default: noise)")
    parser.add_argument("--images", type=int, default=2, help="of a step and of a round of inference (default 2)")
    parser.set_defaults(run=run, title="Detectors")
