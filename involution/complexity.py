"""Parameters and FLOPs of a model, counted as the paper counts them.

The paper's FLOPs are multiply-adds of convolutions, linear layers and involutions, plus the element-wise work: 2 an
element for BatchNorm, 1 for an added bias, ReLU and pooling (an element of its input). Additions of residual branches
are not counted. So counted, RedNet-50 comes to 2.69 G at 224 x 224, and to 2.65 G without the element-wise part.

The model runs once on the meta device (shapes only, no arithmetic); hooks see each layer's shapes. Of a detector every
layer runs once, with as many boxes and masks as the paper counted (``forward_fixed``).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from involution.layers import Involution2d

ELEMENTWISE = (nn.ReLU, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
COUNTED = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear, nn.BatchNorm2d, Involution2d, *ELEMENTWISE)

#: layer, its input, its output -> (multiply-adds, element-wise operations) of a call
Cost = Callable[[nn.Module, Tensor, Tensor], tuple[int, int]]


@dataclass
class Part:
    """One top-level part of a model."""

    name: str
    params: int
    trainable: int
    output: tuple[int, ...] = ()
    macs: int = 0
    elementwise: int = 0


@dataclass
class Complexity:
    """What one image of ``input_size`` costs; ``str()`` gives a table with a line a part."""

    input_size: tuple[int, int, int]
    parts: list[Part] = field(default_factory=list)

    @property
    def params(self) -> int:
        """Trainable and frozen parameters; buffers do not count."""
        return sum(part.params for part in self.parts)

    @property
    def trainable(self) -> int:
        """Parameters that are not frozen: what the paper prints of detectors."""
        return sum(part.trainable for part in self.parts)

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions, linear layers and involutions."""
        return sum(part.macs for part in self.parts)

    @property
    def flops(self) -> int:
        """The paper's FLOPs: ``macs`` and the element-wise work."""
        return self.macs + sum(part.elementwise for part in self.parts)

    def __str__(self) -> str:
        rows = [(p.name, " x ".join(map(str, p.output)), p.params, p.macs, p.macs + p.elementwise) for p in self.parts]
        rows.append(("total", "", self.params, self.macs, self.flops))
        lines = [f"{'part':<10}{'output':>16}{'params (M)':>12}{'MACs (G)':>10}{'FLOPs (G)':>11}"]
        lines += [f"{n:<10}{o:>16}{p / 1e6:>12.3f}{m / 1e9:>10.3f}{f / 1e9:>11.3f}" for n, o, p, m, f in rows]
        return "\n".join(lines)


class _Fixed(nn.Module):
    """A model whose forward is its ``forward_fixed``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> object:
        return self.model.forward_fixed(x)  # type: ignore[operator]


def layer_cost(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
    """(multiply-adds, element-wise operations) of one call of a layer, as the paper counts them.

    A module that multiplies without a layer of its own says so: ``products(x, output)``, multiply-adds, and, where the
    paper counts them, ``additions(x, output)``, element-wise.
    """
    if hasattr(module, "products"):
        additions = module.additions(x, output) if hasattr(module, "additions") else 0  # type: ignore[operator]
        return module.products(x, output), additions  # type: ignore[operator]
    if isinstance(module, nn.Conv2d):
        return output.numel() * module.weight[0].numel(), 0 if module.bias is None else output.numel()
    if isinstance(module, nn.ConvTranspose2d):
        return x.numel() * module.weight[0].numel(), 0 if module.bias is None else output.numel()
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features, 0 if module.bias is None else output.numel()
    if isinstance(module, nn.BatchNorm2d):
        return 0, 2 * x.numel()
    if isinstance(module, Involution2d):
        return output.numel() * module.kernel_size**2, 0  # the weighted sums; the generator's layers are called
    return 0, x.numel()


def count(model: nn.Module, input_size: tuple[int, int, int] = (3, 224, 224), cost: Cost = layer_cost) -> Complexity:
    """Count what ``model`` (on any device, in any mode; it is left unchanged) costs for one image (C, H, W)."""
    result = Complexity(input_size)
    hooks = []
    whole = [(type(model).__name__, model)]
    seen: set[nn.Parameter] = set()  # shared ones count where they come first
    own = {} if isinstance(model, COUNTED) else dict(model.named_parameters(recurse=False))
    if own:
        result.parts.append(_part("own", own.values(), seen))
    for name, child in whole if isinstance(model, COUNTED) else model.named_children():
        part = _part(name, child.parameters(), seen)
        result.parts.append(part)
        hooks.append(child.register_forward_hook(_record_output(part)))
        layers = [m for m in child.modules() if _counts(m)]
        hooks += [layer.register_forward_hook(_add_cost(part, cost), with_kwargs=True) for layer in layers]
    try:
        run_on_meta(model, input_size)
    finally:
        for hook in hooks:
            hook.remove()
    return result


def run_on_meta(model: nn.Module, input_size: tuple[int, int, int]) -> object:
    """The model's output for one image (C, H, W) in evaluation, shapes without numbers; the model is left unchanged."""
    modes = {module: module.training for module in model.modules()}
    runs = _Fixed(model) if hasattr(model, "forward_fixed") else model
    meta = {k: v.detach().to("meta") for k, v in [*runs.named_parameters(), *runs.named_buffers()]}
    dtype = next((tensor.dtype for tensor in meta.values() if tensor.is_floating_point()), None)
    image = torch.empty(1, *input_size, device="meta", dtype=dtype)
    try:
        with torch.no_grad():
            return torch.func.functional_call(runs.eval(), meta, image)
    finally:
        for module, training in modes.items():
            module.training = training


def _counts(module: nn.Module) -> bool:
    return isinstance(module, COUNTED) or hasattr(module, "products")


def _part(name: str, parameters: Iterable[nn.Parameter], seen: set[nn.Parameter]) -> Part:
    new = [p for p in parameters if p not in seen]
    seen.update(new)
    return Part(name, sum(p.numel() for p in new), sum(p.numel() for p in new if p.requires_grad))


def _record_output(part: Part) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        part.output = tuple(tensors[-1].shape[1:]) if tensors else ()

    return hook


def _add_cost(part: Part, cost: Cost) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor) -> None:
        macs, elementwise = cost(module, args[0] if args else next(iter(kwargs.values())), output)
        part.macs += macs
        part.elementwise += elementwise

    return hook
