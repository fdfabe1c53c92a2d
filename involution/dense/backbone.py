"""A classification network as the backbone of a dense one: features at four resolutions.

Shapes of an H x W image, sizes rounded up:  C2 (B, 256, H/4, W/4)  C3 (B, 512, H/8, W/8)  C4 (B, 1024, H/16, W/16)
C5 (B, 2048, H/32, W/32)
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from involution.checks import unknown_name
from involution.models import MODELS, create_model
from involution.models.bottleneck import EXPANSION, STAGE_WIDTHS, BottleneckNetwork
from involution.weights import load_into, open_weights, other_options

if TYPE_CHECKING:
    from typing_extensions import Self

LEVELS = tuple(EXPANSION * width for width in STAGE_WIDTHS)  # channels of C2 to C5
STRIDES = (4, 8, 16, 32)
OTHERS = ("san", "axial")  # networks that are not made of bottlenecks


class Backbone(nn.Module):
    """A network of bottlenecks without its classifier: images (B, 3, H, W) -> [C2, C3, C4, C5].

    Args:
        name: of the network, as ``involution.create_model`` knows it.
        pretrained: path or URL of its weights, or a run's folder: ours, released, for ResNets torchvision's and timm's.
        pretrained_sha256: the file's hash or the beginning of it.
        freeze: parts that stay as they are, as ``BottleneckNetwork.freeze`` takes them (1: stem and first stage); None:
            everything trains.
        norm_eval: leave all BatchNorm statistics as they are while their affine parameters train. Detectors do so, for
            their batches are small; it presumes pre-trained weights.
        options: of the network. A RedNet's ``stem_kernel_size`` is 7 here, as in Section 4.2, and not 3.

    Raises:
        ValueError: an unknown name or option, a network of another kind, or weights that do not fit.
    """

    def __init__(
        self,
        name: str,
        pretrained: str | Path | None = None,
        pretrained_sha256: str | None = None,
        freeze: int | list[str] | None = None,
        norm_eval: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if name not in MODELS:
            raise ValueError(unknown_name("backbone.name", name, [m for m in MODELS if not m.startswith(OTHERS)]))
        if name.startswith("rednet"):
            options = {"stem_kernel_size": 7} | options
        if options.get("output_stride", 32) != 32:
            raise ValueError(f"backbone.output_stride is {options['output_stride']}; a pyramid needs strides up to 32")
        net = create_model(name, num_classes=0, **options)
        if not isinstance(net, BottleneckNetwork):
            raise ValueError(f"backbone.name is {name!r}, which is no network of bottlenecks with levels C2 to C5")
        if pretrained is not None:
            _load(net, name, options, pretrained, pretrained_sha256)
        if freeze is not None:
            net.freeze(freeze)
        if "fc" in net.frozen:
            raise ValueError(f"backbone.freeze is {freeze!r}; a backbone has no classifier fc")
        self.frozen, self.norm_eval = net.frozen, norm_eval
        self.stem, self.maxpool = net.stem, net.maxpool  # so are they called in released files too: backbone.stem...
        self.layer1, self.layer2, self.layer3, self.layer4 = net.layer1, net.layer2, net.layer3, net.layer4
        self.train(self.training)

    def train(self, mode: bool = True) -> "Self":
        """Training or evaluation mode; what is frozen, and with ``norm_eval`` all BatchNorm, keeps to the latter."""
        super().train(mode)
        for name in self.frozen:
            getattr(self, name).eval()
        if self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        x = self.maxpool(self.stem(x))
        levels = []
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            levels.append(x)
        return levels


def build_backbone(config: str | Mapping[str, Any], **defaults: Any) -> Backbone:
    """The backbone of a name, or of ``{"name": ..., OPTION: ...}``; ``defaults`` are options that it may leave out.

    Raises:
        ValueError: as ``Backbone``, or there is no name.
    """
    config = {"name": config} if isinstance(config, str) else dict(config)
    if not isinstance(config.get("name"), str):
        raise ValueError(f'backbone is {config!r}; it should have a name: {{"name": "rednet50"}}')
    return Backbone(**defaults | config)


def _load(net: nn.Module, name: str, options: dict[str, Any], location: str | Path, sha256: str | None) -> None:
    weights: dict[str, Tensor] = {}
    try:
        weights = open_weights(location, sha256).to_ours()
        load_into(net, weights)
    except ValueError as error:
        used = ", ".join(f"{key}={value}" for key, value in {"name": name, **options}.items())
        others = other_options(weights, net.state_dict()).items()
        wanted = " ".join(
            f"{'' if k == 'name' else '+'}model.backbone.{k}={'null' if v is None else v}" for k, v in others
        )
        advice = f"; these weights want {wanted}" if wanted else ""
        raise ValueError(f"backbone.pretrained={location}: {error}. The backbone has {used}{advice}") from error
