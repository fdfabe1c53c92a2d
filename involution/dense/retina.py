"""RetinaNet's dense head (Lin et al., ICCV 2017): its losses and what it detects."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import batched_nms, box_iou, clip_boxes_to_image, sigmoid_focal_loss

from involution.dense.anchors import Anchors, LowQualityMatcher
from involution.dense.images import Images
from involution.dense.pyramid import CHANNELS

STRIDES = (8, 16, 32, 64, 128)
GROUPS = 16  # of a GroupNorm
SCORE, OVERLAP, CANDIDATES, DETECTIONS = 0.05, 0.5, 1000, 100


class Retina(nn.Module):
    """torchvision's head and the paper's losses: focal loss and L1 over the positive anchors of the whole batch.

    Args:
        normalizer: what losses are divided by: "batch", the positive anchors of this process's batch, or "image", each
            image's by its own, and then their mean (torchvision).
        head_norm: GroupNorm after each convolution of the two towers, for training from nothing (He et al., ICCV 2019);
            the paper's have none, and begin with a pre-trained backbone.
        anchor_scale: side of a level's smallest anchor, in strides of the level (the paper: 32 pixels at stride 8).
        stacked_convs: 3 x 3 convolutions of a tower, 1 to 4.
    """

    def __init__(
        self,
        num_classes: int,
        width: int,
        box_loss_beta: float,
        normalizer: str,
        head_norm: bool,
        anchor_scale: float,
        stacked_convs: int,
    ) -> None:
        super().__init__()
        if not 0 < anchor_scale < float("inf"):
            raise ValueError(f"anchor_scale is {anchor_scale!r}; it should be greater than 0, and finite")
        if stacked_convs not in (1, 2, 3, 4):
            raise ValueError(f"stacked_convs is {stacked_convs!r}; it should be 1, 2, 3 or 4")
        if normalizer not in ("batch", "image"):
            raise ValueError(f'normalizer is {normalizer!r}; it should be "batch" or "image"')
        self.box_loss_beta, self.normalizer = box_loss_beta, normalizer
        self.anchors = Anchors(
            [[anchor_scale * stride * 2 ** (i / 3) for i in range(3)] for stride in STRIDES], STRIDES
        )
        norm = partial(nn.GroupNorm, GROUPS) if head_norm else None
        self.head = RetinaNetHead(width, self.anchors.per_pixel, num_classes, norm)
        towers = self.head.classification_head.conv, self.head.regression_head.conv
        with torch.no_grad():  # four of these in a row let little through: from fewer channels as much as from 256
            for tower in towers:
                del tower[stacked_convs:]
                for layer in tower:
                    layer[0].weight *= (CHANNELS / width) ** 0.5
        self.matcher = LowQualityMatcher(0.5, 0.4, lowest=0)
        self.box_coder = BoxCoder((1.0, 1.0, 1.0, 1.0))

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Levels (B, width, H, W) -> logits (B, anchors, classes) and deltas (B, anchors, 4), in float32."""
        found = self.head(levels)
        return found["cls_logits"].float(), found["bbox_regression"].float()

    def losses(self, levels: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """``targets`` in pixels of the batch, labels from 0."""
        logits, deltas = self(levels)
        anchors = torch.cat(self.anchors.grid(levels))
        matched = torch.stack([self._match(target["boxes"], anchors) for target in targets])
        n = (matched >= 0).sum(1, keepdim=True).clamp(min=1) * len(matched)  # of each image
        if self.normalizer == "batch":
            n = (matched >= 0).sum().clamp(min=1).expand(len(matched), 1)
        classification = logits.sum() * 0
        regression = deltas.sum() * 0
        for target, match, told, moved, count in zip(targets, matched, logits, deltas, n, strict=True):
            positive, used = torch.where(match >= 0)[0], match != Matcher.BETWEEN_THRESHOLDS
            own = match[positive]
            wanted = torch.zeros_like(told)
            wanted[positive, target["labels"][own]] = 1
            classification = classification + sigmoid_focal_loss(told[used], wanted[used], reduction="sum") / count[0]
            boxes = self.box_coder.encode_single(target["boxes"][own], anchors[positive])
            apart = F.smooth_l1_loss(moved[positive], boxes, beta=self.box_loss_beta, reduction="sum")
            regression = regression + apart / count[0]
        return {"loss_classifier": classification, "loss_box_reg": regression}

    def _match(self, boxes: Tensor, anchors: Tensor) -> Tensor:
        if len(boxes) == 0:
            return torch.full((len(anchors),), Matcher.BELOW_LOW_THRESHOLD, device=anchors.device)
        return self.matcher(box_iou(boxes, anchors))

    def detections(self, levels: list[Tensor], images: Images) -> list[dict[str, Tensor]]:
        """For each image boxes (in pixels of the batch), labels from 0 and scores."""
        logits, deltas = self(levels)
        grid = self.anchors.grid(levels)
        counts = [len(level) for level in grid]
        results = []
        for told, moved, size in zip(logits, deltas, images.image_sizes, strict=True):
            parts = [self._candidates(*one) for one in zip(told.split(counts), moved.split(counts), grid, strict=True)]
            boxes, scores, labels = (torch.cat(part) for part in zip(*parts, strict=True))
            boxes = clip_boxes_to_image(boxes, size)
            keep = batched_nms(boxes, scores, labels, OVERLAP)[:DETECTIONS]
            results.append({"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]})
        return results

    def _candidates(self, logits: Tensor, deltas: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest boxes, scores and labels of one level."""
        scores, chosen = logits.sigmoid().flatten().topk(min(CANDIDATES, logits.numel()))
        likely = scores > SCORE
        scores, chosen = scores[likely], chosen[likely]
        where, labels = chosen // logits.shape[1], chosen % logits.shape[1]
        return self.box_coder.decode_single(deltas[where], anchors[where]), scores, labels
