"""RetinaNet, Faster R-CNN and Mask R-CNN as trained for Tables 3 and 7, on torchvision's parts.

What torchvision does otherwise is changed: see ``anchors.py``, ``proposals.py``, ``regions.py``, ``roi_align.py`` and
``retina.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image

from involution.checks import check_positive
from involution.dense import plugins
from involution.dense.backbone import LEVELS, build_backbone
from involution.dense.images import Images, Preparation
from involution.dense.proposals import Proposals
from involution.dense.pyramid import CHANNELS, NECKS, FeaturePyramid
from involution.dense.regions import BOX, MASK, Regions
from involution.dense.retina import Retina

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Detector(nn.Module):
    """What the three have in common.

    Args:
        num_classes: of objects; there is none for the background.
        backbone: name of a network of bottlenecks, or a dictionary of its name and the options of ``Backbone``. Stem
            and first stage are frozen and BatchNorm statistics kept unless ``freeze`` and ``norm_eval`` say otherwise;
            that presumes ``pretrained`` weights.
        neck: "convolution" or "involution".
        plugin: None or a block of Table 7 in the backbone (``plugins.PLUGINS``).
        min_size, max_size, image_mean, image_std: see ``Preparation``.
        pyramid_width: channels of the pyramid's levels and of what follows them, the paper's 256 or another multiple of
            16. Most of the work for small pictures.
        box_loss_beta: below which difference the boxes' loss is a square. 0 is the paper's L1, torchvision has 1/9.

    In training a model maps (images, targets) to a dictionary of losses, means over the batch; in evaluation images to
    a list of results. Images are tensors (3, H, W), uint8 or float in [0, 1], of any sizes and on any device; boxes are
    float32 (N, 4), x1 y1 x2 y2, in pixels of the image; labels int64 (N,) in [0, num_classes).

    targets: {"boxes", "labels"}, for Mask R-CNN also "masks", (N, H, W) of 0 and 1. N may be 0. Boxes without area are
        left out.
    results: {"boxes", "labels", "scores"}, the likeliest first, for Mask R-CNN also "masks": (N, 28, 28) probabilities
        inside the boxes, which ``masks.paste_masks`` puts into the image.
    """

    extra: str  # levels of the pyramid, see FeaturePyramid
    first: int  # level of the backbone that the pyramid starts at: 0 is C2
    classifiers: tuple[str, ...]  # parts whose values mean classes

    def __init__(
        self,
        num_classes: int,
        backbone: str | Mapping[str, Any],
        neck: str,
        head: str,
        plugin: str | None,
        min_size: int,
        max_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        pyramid_width: int,
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, pyramid_width=pyramid_width)
        if pyramid_width % 16:
            raise ValueError(f"pyramid_width is {pyramid_width}; it should be a multiple of the 16 channels of a group")
        for argument, value in {"neck": neck, "head": head}.items():
            if value not in NECKS:
                raise ValueError(f'{argument} is {value!r}; it should be "convolution" or "involution"')
        self.num_classes = num_classes
        self.preparation = Preparation(min_size, max_size, image_mean, image_std)
        self.backbone = build_backbone(backbone, freeze=1, norm_eval=True)
        if plugin is not None:
            plugins.add(self.backbone, plugin)
        self.neck = FeaturePyramid(LEVELS[self.first :], neck, self.extra, pyramid_width)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]] | None = None) -> Any:
        batch = self.preparation(images)
        levels = self.neck(self.backbone(batch.tensors)[self.first :])
        if self.training:
            if targets is None or len(targets) != len(images):
                raise ValueError("in training a detector needs targets, one for each image")
            return self.losses(levels, batch, [self._scaled(t, s) for t, s in zip(targets, batch.scales, strict=True)])
        results = self.detections(levels, batch)
        for result, size, scale in zip(results, batch.original_sizes, batch.scales, strict=True):
            result["boxes"] = clip_boxes_to_image(result["boxes"] / scale, size)
        return results

    def _scaled(self, target: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """A target on the model's device with boxes in pixels of the batch, without those that have no area."""
        moved = {key: target[key].to(scale.device) for key in self.wanted}
        moved["boxes"] = moved["boxes"].float().reshape(-1, 4)
        real = (moved["boxes"][:, 2:] > moved["boxes"][:, :2]).all(1)
        kept = {key: value[real] for key, value in moved.items()}
        return kept | {"boxes": kept["boxes"] * scale, "scale": scale}

    wanted: tuple[str, ...] = ("boxes", "labels")  # of a target

    def losses(self, levels: list[Tensor], images: Images, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Named losses; ``targets`` in pixels of the batch."""
        raise NotImplementedError

    def detections(self, levels: list[Tensor], images: Images) -> list[dict[str, Tensor]]:
        """A result for each image, its boxes in pixels of the batch."""
        raise NotImplementedError

    def forward_fixed(self, images: Tensor) -> list[Tensor]:
        """Every layer once on images (B, 3, H, W), with as many boxes and masks as the paper counted FLOPs for."""
        raise NotImplementedError


class RetinaNet(Detector):
    """RetinaNet; with RedNet-50 27.8 M trainable parameters and 38.3 AP in the paper.

    Args:
        normalizer, head_norm, anchor_scale, stacked_convs: see ``Retina``.
    """

    extra, first = "convolution", 1
    classifiers = ("retina.head.classification_head.cls_logits",)

    def __init__(
        self,
        num_classes: int = 80,
        backbone: str | Mapping[str, Any] = "rednet50",
        neck: str = "convolution",
        head: str = "convolution",
        plugin: str | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        pyramid_width: int = CHANNELS,
        box_loss_beta: float = 0.0,
        normalizer: str = "batch",
        head_norm: bool = False,
        anchor_scale: float = 4.0,
        stacked_convs: int = 4,
    ) -> None:
        if head == "involution":
            raise ValueError('head is "involution"; RetinaNet\'s head has convolutions alone: head="convolution"')
        sizes = (min_size, max_size, image_mean, image_std)
        super().__init__(num_classes, backbone, neck, head, plugin, *sizes, pyramid_width)
        self.retina = Retina(
            num_classes, pyramid_width, box_loss_beta, normalizer, head_norm, anchor_scale, stacked_convs
        )

    def losses(self, levels: list[Tensor], images: Images, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.retina.losses(levels, targets)

    def detections(self, levels: list[Tensor], images: Images) -> list[dict[str, Tensor]]:
        return self.retina.detections(levels, images)

    def forward_fixed(self, images: Tensor) -> list[Tensor]:
        return list(self.retina(self.neck(self.backbone(images)[self.first :])))


class FasterRCNN(Detector):
    """Faster R-CNN; with RedNet-50 and involution neck 29.5 M trainable parameters and 40.2 AP in the paper.

    ``head="involution"`` is that of the region proposal network, and in Mask R-CNN the mask head's too.

    Args:
        num_proposals: of an image that get a class. The paper's 1000 are most of the work for small pictures.
        num_samples: of them that are learned from.
        box_width: of the box head's two hidden layers; 13.9 M of the paper's parameters.
        roi_aligned, roi_samples: RoIAlign's half-pixel shift, and its samples along a side of a pixel; 0: as many as
            there are pixels below it. torchvision has False and 2.
    """

    extra, first, has_masks = "subsample", 0, False
    classifiers = ("regions.box_predictor", "regions.mask_predictor.mask_fcn_logits")

    def __init__(
        self,
        num_classes: int = 80,
        backbone: str | Mapping[str, Any] = "rednet50",
        neck: str = "convolution",
        head: str = "convolution",
        plugin: str | None = None,
        min_size: int = 800,
        max_size: int = 1333,
        image_mean: Sequence[float] = MEAN,
        image_std: Sequence[float] = STD,
        pyramid_width: int = CHANNELS,
        box_loss_beta: float = 0.0,
        num_proposals: int = 1000,
        num_samples: int = 512,
        box_width: int = 1024,
        roi_aligned: bool = True,
        roi_samples: int = 0,
    ) -> None:
        sizes = (min_size, max_size, image_mean, image_std)
        super().__init__(num_classes, backbone, neck, head, plugin, *sizes, pyramid_width)
        check_positive(num_proposals=num_proposals, num_samples=num_samples, box_width=box_width)
        self.proposals = Proposals(head, num_proposals, pyramid_width, box_loss_beta)
        widths = (box_width, pyramid_width)
        self.regions = Regions(
            num_classes, head, self.has_masks, num_samples, *widths, box_loss_beta, roi_aligned, roi_samples
        )

    def losses(self, levels: list[Tensor], images: Images, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        targets = [target | {"labels": target["labels"] + 1} for target in targets]  # 0 is the background inside
        features = _named(levels)
        proposals, losses = self.proposals(images, features, targets)
        return losses | self.regions.losses(features, [p.detach() for p in proposals], targets)

    def detections(self, levels: list[Tensor], images: Images) -> list[dict[str, Tensor]]:
        features = _named(levels)
        proposals, _ = self.proposals(images, features)
        results = self.regions.detections(features, proposals, images.image_sizes)
        return [result | {"labels": result["labels"] - 1} for result in results]

    def forward_fixed(self, images: Tensor) -> list[Tensor]:
        levels = self.neck(self.backbone(images))
        objectness, deltas = self.proposals.head(levels)
        width = levels[0].shape[1]
        pooled = levels[0].new_zeros(1000, width, BOX, BOX)
        outputs = [*objectness, *deltas, *self.regions.box_predictor(self.regions.box_head(pooled))]
        if self.has_masks:
            pooled = levels[0].new_zeros(100, width, MASK, MASK)
            outputs.append(self.regions.mask_predictor(self.regions.mask_head(pooled)))
        return outputs


class MaskRCNN(FasterRCNN):
    """Mask R-CNN; with RedNet-50 and involution neck 32.2 M trainable parameters, 40.8 box AP, 36.4 mask AP (paper)."""

    has_masks = True
    wanted = ("boxes", "labels", "masks")


def _named(levels: list[Tensor]) -> dict[str, Tensor]:
    return {f"P{i + 2}": level for i, level in enumerate(levels)}
