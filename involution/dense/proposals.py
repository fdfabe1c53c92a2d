"""The region proposal network (Ren et al., NeurIPS 2015) with a 3x3 convolution or an involution in its head."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.rpn import RegionProposalNetwork

from involution.dense.anchors import Anchors, LowQualityMatcher
from involution.dense.pyramid import spatial_layer
from involution.layers import Involution2d

SIZES = ((32,), (64,), (128,), (256,), (512,))
STRIDES = (4, 8, 16, 32, 64)


def init_kaiming(module: nn.Module) -> nn.Module:
    """Kaiming normal (fan out) for convolutions, those of an involution's generator included; biases 0."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


class ProposalHead(nn.Module):
    """Objectness and box deltas of the anchors at each pixel; one and the same layers for all levels."""

    def __init__(self, head: str, anchors: int, width: int) -> None:
        super().__init__()
        self.conv = spatial_layer(head, "head", width)
        self.act = nn.ReLU(inplace=True)
        self.objectness = nn.Conv2d(width, anchors, 1)
        self.deltas = nn.Conv2d(width, 4 * anchors, 1)
        for layer in self.children():
            if isinstance(layer, Involution2d):
                init_kaiming(layer)
            elif isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, levels: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Levels (B, width, H, W) -> objectness (B, anchors, H, W), deltas (B, 4 * anchors, H, W): float32, always."""
        hidden = [self.act(self.conv(x)) for x in levels]
        return [self.objectness(x).float() for x in hidden], [self.deltas(x).float() for x in hidden]


class Proposals(RegionProposalNetwork):
    """torchvision's, with the paper's values: L1 and not smooth L1, ``count`` proposals an image in training too."""

    def __init__(self, head: str, count: int, width: int, box_loss_beta: float) -> None:
        anchors = Anchors(SIZES, STRIDES)
        super().__init__(
            anchors,  # type: ignore[arg-type]
            ProposalHead(head, anchors.per_pixel, width),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * count, "testing": count},
            post_nms_top_n={"training": count, "testing": count},
            nms_thresh=0.7,
        )
        self.box_loss_beta = box_loss_beta
        self.proposal_matcher = LowQualityMatcher(0.7, 0.3, lowest=0.3)

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Over the sampled anchors of the batch: binary cross-entropy, and (smooth) L1 of the positive ones."""
        positive, negative = (torch.where(torch.cat(chosen))[0] for chosen in self.fg_bg_sampler(labels))
        sampled = torch.cat([positive, negative])
        n = max(1, len(sampled))
        told, wanted = objectness.flatten()[sampled], torch.cat(labels)[sampled]
        classification = F.binary_cross_entropy_with_logits(told, wanted, reduction="sum") / n
        targets = torch.cat(regression_targets)[positive]
        regression = F.smooth_l1_loss(pred_bbox_deltas[positive], targets, beta=self.box_loss_beta, reduction="sum")
        return classification, regression / n
