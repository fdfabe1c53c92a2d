"""Our networks under timm's names and conventions: ``timm.create_model("rednet50", features_only=True)``.

Imported by ``involution`` as soon as timm is; the weights' names are those of ``involution.create_model``. timm has
ResNets of its own, so ours are not among them.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model, register_notrace_module
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import Tensor, nn

from involution.layers import Involution2d
from involution.models import aa, axial, lrnet, rednet, san, standalone
from involution.models.aa import AAResNet, AugmentedConvolution
from involution.models.axial import AxialAttention, AxialResNet
from involution.models.lrnet import LocalRelation, LRNet
from involution.models.rednet import RedNet
from involution.models.san import SAN, SelfAttention
from involution.models.staged import StagedNetwork
from involution.models.standalone import AttentionStem, LocalAttention, StandAloneResNet
from involution.weights import open_weights, to_ours
from involution.weights.published import PUBLISHED

ATTENTIONS = (AugmentedConvolution, AxialAttention, LocalRelation, SelfAttention, AttentionStem, LocalAttention)
for layer in (Involution2d, *ATTENTIONS):
    register_notrace_module(layer)  # timm's torch.fx graphs keep the layer whole: it runs as one operator then
STAGES = ("layer1", "layer2", "layer3", "layer4")


class TimmNetwork(StagedNetwork):
    """What timm expects of a model; for the network's class to be added as the second base."""

    def __init__(
        self,
        *arguments: Any,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        with nullcontext() if device is None else torch.device(device):
            super().__init__(*arguments, **options)
        self.to(dtype=dtype)
        self.in_chans = options.get("in_chans", 3)
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.head_hidden_size = self.num_features
        if global_pool != "avg":
            self.reset_classifier(self.num_classes, global_pool)

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return "fc" if name_only else self.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Regular expressions for layer-wise learning rates."""
        return {"stem": r"^stem", "blocks": r"^layer(\d+)" if coarse else r"^layer(\d+)\.(\d+)"}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward instead of keeping its activations."""
        self.grad_checkpointing = enable

    def _stage(self, name: str, x: Tensor) -> Tensor:
        stage = getattr(self, name)
        return checkpoint_seq(stage, x) if self.grad_checkpointing and self.training else stage(x)

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> features of the last stage (B, 2048, H/32, W/32)."""
        x = self.maxpool(self.stem(x))
        for name in STAGES:
            x = self._stage(name, x)
        return x

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features of the chosen levels (0 stem, 1 to 4 stages; an int: the last n), with or without the final ones."""
        if output_fmt != "NCHW":
            raise ValueError(f'output_fmt is {output_fmt!r}; it should be "NCHW"')
        take, last = feature_take_indices(len(self.feature_info), indices)
        intermediates = []
        x = self.stem(x)
        if 0 in take:
            intermediates.append(x)
        x = self.maxpool(x)
        for level, name in enumerate(STAGES[:last] if stop_early else STAGES, start=1):
            x = self._stage(name, x)
            if level in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what the chosen levels do not need."""
        take, last = feature_take_indices(len(self.feature_info), indices)
        for name in STAGES[last:]:
            setattr(self, name, nn.Sequential())
        if last == 0:
            self.maxpool = nn.Identity()  # type: ignore[assignment]
        if last < len(STAGES):
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or last < len(STAGES):
            self.reset_classifier(0, "")
        return take


class TimmRedNet(TimmNetwork, RedNet):
    """RedNet."""


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
    c.__bases__[1]: c for c in (TimmRedNet, TimmSAN, TimmStandAloneResNet, TimmLRNet, TimmAAResNet, TimmAxialResNet)
}
MAKERS = rednet.MODELS | san.MODELS | standalone.MODELS | lrnet.MODELS | aa.MODELS | axial.MODELS
CFG = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": (7, 7),
    "crop_pct": 0.875,
    "interpolation": "bilinear",
    "mean": IMAGENET_DEFAULT_MEAN,
    "std": IMAGENET_DEFAULT_STD,
    "classifier": "fc",
}


def _cfg(name: str, maker: partial[Any]) -> dict[str, Any]:
    """Of the layers that see the images, timm adapts the weights to other numbers of channels."""
    first: str | tuple[str, ...] = "stem.conv1"
    if maker.func is StandAloneResNet:
        first = ("stem.query", "stem.key", "stem.value")
    elif "axial" in maker.args:
        first = ("stem.0.conv_down", "stem.0.downsample.0")
    cfg = CFG | {"first_conv": first}
    if name in PUBLISHED:
        cfg |= {
            "url": PUBLISHED[name].url,
            "license": PUBLISHED[name].licence.lower(),
            "paper_ids": "arXiv:2103.06255",
            "paper_name": "Involution: Inverting the Inherence of Convolution for Visual Recognition",
            "origin_url": "https://github.com/d-li14/involution",
        }
    return cfg


default_cfgs = generate_default_cfgs({name: _cfg(name, maker) for name, maker in MAKERS.items()})


def build_of(network: Callable[..., nn.Module], name: str, pretrained: bool, **options: Any) -> nn.Module:
    """Weights are the published ones, or those of ``pretrained_cfg_overlay={"file": PATH}``: ours, released, timm's."""
    overlay = dict(options.pop("pretrained_cfg_overlay", None) or {})
    elsewhere = any(overlay.get(key) for key in ("url", "hf_hub_id", "state_dict"))
    known = name in PUBLISHED or "file" in overlay
    if pretrained and known and not elsewhere and isinstance(options.get("pretrained_cfg"), str | None):
        overlay["state_dict"] = open_weights(overlay.pop("file", name)).to_ours()  # timm reads torch's own files alone
    model = build_model_with_cfg(
        network,
        name,
        pretrained,
        pretrained_filter_fn=lambda state, model: to_ours(state),
        pretrained_cfg_overlay=overlay or None,
        **options,
    )
    for module in model.modules():  # of features, the network inside
        getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
    return model


def _register(name: str, maker: partial[Any]) -> None:
    def build(pretrained: bool = False, **options: Any) -> nn.Module:
        """See ``build_of``."""
        network = partial(CLASSES[maker.func], *maker.args, **maker.keywords)
        return build_of(network, name, pretrained, **options)

    build.__name__ = name
    register_model(build)


for _name, _maker in MAKERS.items():
    _register(_name, _maker)
