"""The self-attention family under timm's names and conventions; nobody has published weights that timm could fetch."""

from functools import partial
from typing import Any

from timm.models import generate_default_cfgs, register_model, register_notrace_module
from torch import nn

from involution.models import aa, axial, lrnet, san, standalone
from involution.models.aa import AAResNet, AugmentedConvolution
from involution.models.axial import AxialAttention, AxialResNet
from involution.models.lrnet import LocalRelation, LRNet
from involution.models.san import SAN, SelfAttention
from involution.models.standalone import AttentionStem, LocalAttention, StandAloneResNet
from involution.models.timm_rednet import CFG, TimmNetwork, build_of

for layer in (AugmentedConvolution, AxialAttention, LocalRelation, SelfAttention, AttentionStem, LocalAttention):
    register_notrace_module(layer)


class TimmSAN(TimmNetwork, SAN):
    """SAN."""


class TimmStandAloneResNet(TimmNetwork, StandAloneResNet):
    """Stand-Alone ResNet."""


class TimmLRNet(TimmNetwork, LRNet):
    """LR-Net."""


class TimmAAResNet(TimmNetwork, AAResNet):
    """AA-ResNet."""


class TimmAxialResNet(TimmNetwork, AxialResNet):
    """Axial ResNet."""


CLASSES: dict[Any, type[TimmNetwork]] = {
    c.__bases__[1]: c for c in (TimmSAN, TimmStandAloneResNet, TimmLRNet, TimmAAResNet, TimmAxialResNet)
}
MAKERS = san.MODELS | standalone.MODELS | lrnet.MODELS | aa.MODELS | axial.MODELS


def _cfg(maker: partial[Any]) -> dict[str, Any]:
    """Of the layers that see the images, timm adapts the weights to other numbers of channels."""
    first: str | tuple[str, ...] = "stem.conv1"
    if maker.func is StandAloneResNet:
        first = ("stem.query", "stem.key", "stem.value")
    elif "axial" in maker.args:
        first = ("stem.0.conv_down", "stem.0.downsample.0")
    return CFG | {"first_conv": first}


default_cfgs = generate_default_cfgs({name: _cfg(maker) for name, maker in MAKERS.items()})


def _register(name: str, maker: partial[Any]) -> None:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        """Weights are those of ``pretrained_cfg_overlay={"file": PATH}``."""
        network = partial(CLASSES[maker.func], *maker.args, **maker.keywords)
        return build_of(network, name, pretrained, **options)

    build.__name__ = name
    register_model(build)


for _name, _maker in MAKERS.items():
    _register(_name, _maker)
