"""Trained weights that anybody can download, by the name of their model."""

from typing import NamedTuple


class Published(NamedTuple):
    """A file of weights and where it comes from."""

    url: str
    origin: str
    licence: str
    top1: float  # on ImageNet's validation set in percent, as its publisher states it
    top5: float


def _paddle(depth: int, top1: float, top5: float) -> Published:
    """The authors' own links are behind logins; PaddleClas serves the same five networks in its own layout."""
    url = f"https://paddle-imagenet-models-name.bj.bcebos.com/dygraph/RedNet{depth}_pretrained.pdparams"
    return Published(url, "PaddleClas", "Apache-2.0", top1, top5)


PUBLISHED = {
    "rednet26": _paddle(26, 75.95, 93.19),
    "rednet38": _paddle(38, 77.47, 93.56),
    "rednet50": _paddle(50, 78.33, 94.17),
    "rednet101": _paddle(101, 78.94, 94.36),
    "rednet152": _paddle(152, 79.17, 94.40),
}
