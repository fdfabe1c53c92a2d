"""Dense prediction with involution (Tables 3, 4, 5 and 7): backbone, pyramid, segmentors and detectors."""

from involution.dense.detectors import FasterRCNN, MaskRCNN, RetinaNet
from involution.dense.segmentors import SemanticFPN, UPerNet

MODELS = {
    "retinanet": RetinaNet,
    "faster_rcnn": FasterRCNN,
    "mask_rcnn": MaskRCNN,
    "semantic_fpn": SemanticFPN,
    "upernet": UPerNet,
}

__all__ = ["MODELS", "FasterRCNN", "MaskRCNN", "RetinaNet", "SemanticFPN", "UPerNet"]
