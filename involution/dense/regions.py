"""What follows the proposals in Faster and Mask R-CNN: boxes, their classes and masks.

Inside, class 0 is the background, as in torchvision; ``detectors.py`` counts the real classes from 0.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads

from involution.dense.anchors import LowQualityMatcher
from involution.dense.masks import mask_targets, zero_loss
from involution.dense.proposals import init_kaiming
from involution.dense.pyramid import spatial_layer
from involution.dense.roi_align import RoIAlign

BOX, MASK = 7, 14  # pixels a side that are pooled for a box and for its mask


class Regions(RoIHeads):
    """torchvision's RoIHeads with the paper's losses (L1), RoIAlign and initialisation.

    Args:
        num_classes: without the background.
        head: "convolution", or "involution" in the mask head.
        masks: whether there is a mask head.
        samples: proposals of an image that are learned from.
        width: of the box head's two hidden layers.
        channels: of the pyramid's levels.
        box_loss_beta, roi_aligned, roi_samples: see ``FasterRCNN``.
    """

    def __init__(
        self,
        num_classes: int,
        head: str,
        masks: bool,
        samples: int,
        width: int,
        channels: int,
        box_loss_beta: float,
        roi_aligned: bool,
        roi_samples: int,
    ) -> None:
        super().__init__(
            RoIAlign(BOX, roi_aligned, roi_samples),
            TwoMLPHead(channels * BOX**2, width),
            FastRCNNPredictor(width, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            batch_size_per_image=samples,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=0.05,
            nms_thresh=0.5,
            detections_per_img=100,
        )
        for layer, std in (
            (self.box_head.fc6, None),
            (self.box_head.fc7, None),
            (self.box_predictor.cls_score, 0.01),
            (self.box_predictor.bbox_pred, 0.001),
        ):
            nn.init.zeros_(layer.bias)
            nn.init.xavier_uniform_(layer.weight) if std is None else nn.init.normal_(layer.weight, std=std)
        self.box_loss_beta = box_loss_beta
        self.proposal_matcher = Matcher(0.5, 0.5)
        if masks:
            self.proposal_matcher = LowQualityMatcher(0.5, 0.5, lowest=0.5)  # the release has it with masks alone
            self.mask_roi_pool = RoIAlign(MASK, roi_aligned, roi_samples)
            layers = [
                layer for _ in range(4) for layer in (spatial_layer(head, "head", channels), nn.ReLU(inplace=True))
            ]
            self.mask_head = init_kaiming(nn.Sequential(*layers))
            self.mask_predictor = init_kaiming(MaskRCNNPredictor(channels, channels, num_classes + 1))

    def classify(self, features: Mapping[str, Tensor], boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits (N, classes + 1) and deltas (N, 4 * (classes + 1)) of all images' boxes, in float32."""
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, boxes)))
        return logits.float(), deltas.float()

    def masks(self, features: Mapping[str, Tensor], boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Logits (N, 28, 28) of each box's own class, in float32."""
        logits = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes)))
        return logits[torch.arange(len(labels), device=labels.device), labels].float()

    def losses(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Means over the sampled boxes of the batch; ``targets`` in pixels of the batch, labels from 1."""
        boxes, matched, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.classify(features, boxes)
        label = torch.cat(labels)
        n = max(1, len(label))
        positive = torch.where(label > 0)[0]
        own = deltas.unflatten(1, (-1, 4))[positive, label[positive]]
        moved = F.smooth_l1_loss(own, torch.cat(wanted)[positive], beta=self.box_loss_beta, reduction="sum")
        losses = {"loss_classifier": F.cross_entropy(logits, label, reduction="sum") / n, "loss_box_reg": moved / n}
        if self.has_mask():
            chosen = [torch.where(label > 0)[0] for label in labels]
            boxes = [b[i] for b, i in zip(boxes, chosen, strict=True)]
            matched = [m[i] for m, i in zip(matched, chosen, strict=True)]
            losses["loss_mask"] = self._mask_loss(features, boxes, matched, label[positive], targets)
        return losses

    def _mask_loss(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        matched: list[Tensor],
        labels: Tensor,
        targets: Sequence[dict[str, Tensor]],
    ) -> Tensor:
        if len(labels) == 0:
            return zero_loss([*self.mask_head.parameters(), *self.mask_predictor.parameters()])
        logits = self.masks(features, boxes, labels)
        size = logits.shape[-1]
        wanted = [
            mask_targets(target["masks"], b / target["scale"], m, size)
            for target, b, m in zip(targets, boxes, matched, strict=True)
            if len(m)
        ]
        return F.binary_cross_entropy_with_logits(logits, torch.cat(wanted))

    def detections(
        self, features: Mapping[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> list[dict[str, Tensor]]:
        """For each image boxes (in pixels of the batch), labels from 1, scores, and masks inside the boxes."""
        found = self.postprocess_detections(*self.classify(features, proposals), proposals, image_sizes)
        results = [{"boxes": b, "scores": s, "labels": c} for b, s, c in zip(*found, strict=True)]
        if self.has_mask():
            boxes = [r["boxes"] for r in results]
            counts = [len(b) for b in boxes]
            labels = torch.cat([r["labels"] for r in results])
            size = 2 * MASK
            masks = self.masks(features, boxes, labels) if len(labels) else torch.zeros(0, size, size)
            for result, own in zip(results, masks.sigmoid().to(labels.device).split(counts), strict=True):
                result["masks"] = own
        return results
