"""Shared by the tests of models: weights and statistics that make an evaluation meaningful."""

import torch
from torch import nn

from involution.models.aa import AAResNet
from involution.models.axial import AxialResNet
from involution.models.lrnet import LRNet
from involution.models.san import SAN
from involution.models.standalone import StandAloneResNet

ONE = (1, 1, 1, 1)
#: the self-attention families: a small network, and the side of its images
ATTENTION = {
    "standalone": (lambda: StandAloneResNet(ONE, 3, kernel_size=3), 33),
    "lrnet": (lambda: LRNet(ONE, (64, 128, 256, 512), 3, kernel_size=3), 33),
    "pairwise": (lambda: SAN("pairwise", (1, *ONE), 3), 130),
    "patchwise": (lambda: SAN("patchwise", (1, *ONE), 3), 130),
    "aa": (lambda: AAResNet(ONE, 3, image_size=64), 64),
    "axial": (lambda: AxialResNet(ONE, 0.5, "axial", 3), 33),
    "axial_full_span": (lambda: AxialResNet(ONE, 0.5, "convolution", 3, span=None, image_size=64), 64),
}


def fitted(model: nn.Module, size: int = 64, seed: int = 0) -> nn.Module:
    """``model`` in eval mode with live residual branches and BatchNorm statistics of its own activations.

    A fresh RedNet that is not normalised overflows: every block multiplies activations with kernels made from them.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    for name, norm in norms.items():
        # weak branches: an involution squares its input's deviations, and a chain of them amplifies rounding
        strength = 0.2 if name.endswith("bn3") and name.startswith("layer") else 1.0
        nn.init.uniform_(norm.weight, 0.5 * strength, strength, generator=generator)
        nn.init.normal_(norm.bias, std=0.1, generator=generator)
        norm.momentum = 1.0
    images = torch.randn(4, first.in_channels, size, size, generator=generator, dtype=first.weight.dtype)
    with torch.no_grad():
        model.train()(images)
    for norm in norms.values():
        norm.momentum = 0.1
    return model.eval()
