"""Which layers a model's forward calls, how often, and which of them reads whose output: told by ``torch.fx``."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from involution.checks import NotTraced
from involution.layers import Involution2d
from involution.unwatched import as_it_seems, is_batch_norm


class _Tracer(fx.Tracer):
    """Calls of torch's layers and of ``leaves``; notes the tensors that are read without calling their module."""

    def __init__(self, leaves: tuple[type[nn.Module], ...]) -> None:
        super().__init__()
        self.leaves = leaves
        self.read: set[int] = set()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (NotTraced, *self.leaves)) or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)


class Calls:
    """The calls of ``model(...)`` in the mode that it is in, its optional arguments at their defaults or, with
    ``any_arguments``, unknown.

    Raises:
        Exception: of any kind, if the forward cannot be run on symbolic values, or runs otherwise the second time.
    """

    def __init__(
        self, model: nn.Module, leaves: tuple[type[nn.Module], ...] = (Involution2d,), any_arguments: bool = False
    ) -> None:
        self.model, self.leaves = model, leaves
        self.probe = copy.deepcopy(model, {id(p): p for p in model.parameters()})  # its forward may keep what it sees
        self.optional = {
            name: p.default
            for name, p in inspect.signature(self.probe.forward).parameters.items()
            if isinstance(p.default, (bool, int, float, str, type(None)))
        }
        self.tracer, self.nodes = self._trace(any_arguments)
        kept = [value.node for value in _held_by(self.probe) if isinstance(value, fx.Proxy)]
        first = self.order()
        self.tracer, self.nodes = self._trace(any_arguments)
        if self.order() != first:
            raise ValueError("it calls other modules the second time")
        self.times = Counter(node.target for node in self.nodes if node.op == "call_module")
        self.kept = {node.name for node in kept}

    def _trace(self, any_arguments: bool) -> tuple[_Tracer, list[fx.Node]]:
        tracer = _Tracer(self.leaves)
        with torch.no_grad():
            graph = tracer.trace(self.probe, concrete_args=None if any_arguments else self.optional)
        return tracer, list(graph.nodes)

    def order(self) -> list[tuple[str, ...]]:
        """What is called on what, to be compared with another model's."""
        return [(node.op, str(node.target), str(node.args), str(node.kwargs)) for node in self.nodes]

    def once(self, module: nn.Module) -> bool:
        """Whether it is called once, and its tensors are not used in any other way."""
        path = next(path for path, other in self.model.named_modules() if other is module)
        probe = self.probe.get_submodule(path)
        tensors = *probe.parameters(), *probe.buffers()
        return self.times[path] == 1 and not any(id(tensor) in self.tracer.read for tensor in tensors)

    def chains(self) -> Iterator[tuple[nn.Module, nn.BatchNorm2d, nn.ReLU | None]]:
        """A layer, the BatchNorm in evaluation mode that alone reads its output, and the ReLU that alone reads that, if
        there is one. The first two are called once."""
        for node in self.nodes:
            norm_node = self._reader(node)
            act_node = self._reader(norm_node) if norm_node is not None else None
            layer, norm, act = (self._module(n) if n is not None else None for n in (node, norm_node, act_node))
            if layer is None or norm is None or not is_batch_norm(norm):
                continue
            if norm.running_mean is None or norm.training or not (self.once(layer) and self.once(norm)):
                continue
            yield layer, norm, act if isinstance(act, nn.ReLU) and as_it_seems(act, nn.ReLU) else None

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _reader(self, node: fx.Node) -> fx.Node | None:
        """The one module call that reads a node's output as its only argument, if nobody else does or keeps it."""
        readers = list(node.users)
        if len(readers) != 1 or readers[0].op != "call_module" or node.name in self.kept:
            return None
        return readers[0] if readers[0].args == (node,) and not readers[0].kwargs else None


def _held_by(model: nn.Module) -> Iterator[Any]:
    """What the modules' attributes hold, in lists and dictionaries too."""
    for module in model.modules():
        yield from tree_leaves({name: value for name, value in vars(module).items() if not name.startswith("_")})
