"""Dense prediction with involution (Tables 3, 4, 5 and 7): backbone, pyramid, segmentors and detectors."""

from involution.dense.segmentors import SemanticFPN, UPerNet

MODELS = {"semantic_fpn": SemanticFPN, "upernet": UPerNet}

__all__ = ["MODELS", "SemanticFPN", "UPerNet"]
