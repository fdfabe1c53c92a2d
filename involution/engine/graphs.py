"""A model whose forward and backward are two CUDA graphs (train.cuda_graphs): two launches instead of a thousand.

A GPU of today is through with 32 images before Python has launched the next kernels. A graph holds the launches of a
forward, another those of its backward: the same kernels in the same order, so that values, gradients and the course of
training are those without, as long as a model draws its random numbers on the GPU. Memory of the captured step stays
allocated.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from involution.engine.errors import UserError


class Captured(nn.Module):
    """A model whose training is replayed; in evaluation it runs as it is.

    Args:
        model: its parameters and buffers stay where they are from the first call on.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._graphs: dict[Any, Any] = {}

    def forward(self, images: Tensor) -> Any:
        """images (B, C, H, W): the model's outputs, which the next call overwrites. A capture for every new shape.

        Raises:
            UserError: something in the model cannot be captured: it waits for the GPU, say.
        """
        if not (self.model.training and torch.is_grad_enabled()):
            return self.model(images)
        if (layout := _layout(images)) not in self._graphs:
            self.capture(images)
        return self._graphs[layout](images)

    def capture(self, images: Tensor) -> None:
        """Write down what training on images of this shape launches; the model stays as it is."""
        # gradients are collected on the stream of the capture, for which autograd waits: no more warnings of that
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        # a kernel first, so that autograd's thread has a CUDA context before cuBLAS warns that there is none
        torch.ones((), device=images.device, requires_grad=True).square().backward()
        device, dtype = images.device.type, torch.get_autocast_dtype(images.device.type)
        autocast = torch.autocast(device, dtype, torch.is_autocast_enabled(device), cache_enabled=False)
        try:
            with autocast, _as_before(self.model, images.device), _others_go_on():
                called, like = _Uncaptured(self.model), (images.clone(),)
                self._graphs[_layout(images)] = torch.cuda.make_graphed_callables(called, like, allow_unused_input=True)
        except RuntimeError as error:
            cause: BaseException = error  # what ended the capture, not that it has ended
            while cause.__context__ is not None:
                cause = cause.__context__
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = str(cause).strip().splitlines()[0]
            raise UserError(
                f"train.cuda_graphs=true: this model cannot be captured ({reason}); set it to false"
            ) from error


def _layout(images: Tensor) -> Any:
    return images.shape, images.stride(), images.dtype


class _Uncaptured(nn.Module):
    """Calls a model: `make_graphed_callables` replaces the `forward` of what it is given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images)


class _ThreadLocalGraph(torch.cuda.graph):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options | {"capture_error_mode": "thread_local"})


@contextmanager
def _others_go_on() -> Iterator[None]:
    """Let other threads pin, copy and decode meanwhile; not all versions of `make_graphed_callables` can be told to."""
    graph, torch.cuda.graph = torch.cuda.graph, _ThreadLocalGraph  # type: ignore[misc]
    try:
        yield
    finally:
        torch.cuda.graph = graph  # type: ignore[misc]


@contextmanager
def _as_before(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Take back what the runs before a capture do to buffers (BatchNorm's statistics) and to random numbers."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    states = torch.get_rng_state(), torch.cuda.get_rng_state(device)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        torch.set_rng_state(states[0])
        torch.cuda.set_rng_state(states[1], device)
