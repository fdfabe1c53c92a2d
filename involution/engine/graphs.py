"""A model whose forward and backward are two CUDA graphs (train.cuda_graphs): two launches instead of a thousand.

A GPU of today is through with 32 images before Python has launched the next kernels. A graph holds the launches of a
forward, another those of its backward: the same kernels in the same order, so that values, gradients and the course of
training are those without, as long as a model draws its random numbers on the GPU and uses a weight once (the gradients
of a weight that is used twice are added in fp32, not in the type of autocast). Memory of the captured step stays
allocated.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from involution.checks import first_line
from involution.engine.errors import UserError


class Captured(nn.Module):
    """A model whose training is replayed; in evaluation it runs as it is.

    Args:
        model: its parameters and buffers stay where they are from the first call on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._graphs: Any = None
        self._layout: Any = None  # of the images that they are for

    def forward(self, images: Tensor) -> Any:
        """images (B, C, H, W): the model's outputs, which the next call overwrites. A capture whenever the shape is
        another than that of the call before.

        Raises:
            UserError: something in the model cannot be captured: it waits for the GPU, say.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self.model(images)
        if _layout(images) != self._layout:
            self.capture(images)
        return self._graphs(images)

    def capture(self, images: Tensor) -> None:
        """Write down what training on images of this shape launches; the model stays as it is."""
        torch.cuda.synchronize(images.device)
        self._graphs = self._layout = None  # what was captured before gives its memory back
        gc.collect()  # it has references to itself
        # gradients are collected on the stream of the capture, for which autograd waits: no more warnings of that
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # a kernel first, so that autograd's thread has a CUDA context before cuBLAS warns that there is none
        torch.ones((), device=images.device, requires_grad=True).square().backward()
        device = images.device.type
        enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        called = _Autocast(self.model, torch.autocast(device, dtype, enabled, cache_enabled=False))
        with torch.autocast(device, enabled=False), _as_before(self.model, images.device), _others_go_on():
            self._graphs = torch.cuda.make_graphed_callables(called, (images.clone(),), allow_unused_input=True)
        self._layout = _layout(images)


def _layout(images: Tensor) -> Any:
    return images.shape, images.stride(), images.dtype


class _Autocast(nn.Module):
    """Calls a model within autocast, so that its backward is outside, as without graphs. And `make_graphed_callables`
    replaces the `forward` of what it is given."""

    def __init__(self, model: nn.Module, autocast: torch.autocast) -> None:
        super().__init__()
        self.model, self.autocast = model, autocast

    def forward(self, images: Tensor) -> Any:
        with self.autocast:
            return self.model(images)


class _Capture(torch.cuda.graph):
    """Other threads may pin, copy and decode meanwhile; what ends a capture early is told, not that it has ended."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"capture_error_mode": "thread_local"})

    def __exit__(self, *raised: Any) -> None:
        error: BaseException | None = raised[1]
        try:
            super().__exit__(*raised)
        except RuntimeError as ended:
            error = error or ended
        if isinstance(error, torch.OutOfMemoryError):
            raise error
        if isinstance(error, Exception):
            raise UserError(
                f"train.cuda_graphs=true: this model cannot be captured ({first_line(error)}); set it to false"
            ) from error


@contextmanager
def _others_go_on() -> Iterator[None]:
    """Capture as `_Capture` does; not all versions of `make_graphed_callables` can be told to."""
    graph, torch.cuda.graph = torch.cuda.graph, _Capture  # type: ignore[misc]
    try:
        yield
    finally:
        torch.cuda.graph = graph  # type: ignore[misc]


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Take back what the runs before a capture do to buffers (BatchNorm's statistics) and to random numbers; not after
    a failure, which leaves the GPU unable to."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    yield
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state(states[1], device)
