"""The involution operator: one public function, a literal reference and one backend a device."""

from .functional import involution2d, neighbourhood_product, span_involution2d

__all__ = ["involution2d", "neighbourhood_product", "span_involution2d"]
