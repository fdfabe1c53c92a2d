"""Involution (CVPR 2021): the operator, the layer and the networks made of it.

``import timm`` together with ``import involution``, in either order, and ``timm.create_model("rednet50")`` works.
"""

from involution.conversion import convert
from involution.folding import fold
from involution.layers import Involution2d
from involution.loading import load
from involution.models import create_model
from involution.models.timm_hook import register_with_timm
from involution.ops import involution2d, neighbourhood_product

register_with_timm()

__version__ = "0.1.0"
__all__ = [
    "Involution2d",
    "__version__",
    "convert",
    "create_model",
    "fold",
    "involution2d",
    "load",
    "neighbourhood_product",
]
