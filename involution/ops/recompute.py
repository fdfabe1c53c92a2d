"""A layer in training on the CPU, also with the BatchNorm and the ReLU in front of it, as one operator.

Autograd would keep the input of the BatchNorm and, for the layer, the output of the ReLU. Both have the same size, and
one pass over the first makes the second: it is made again in the backward, to the last bit, and not kept. The idea is
that of in-place activated BatchNorm (Bulo et al., CVPR 2018); here no inverse is taken.

An involution layer, reduce, BatchNorm, ReLU, span and involution, keeps neither its kernels nor its hidden tensor. The
two gradients of its input are added up where the first one lies, and the thin ``reduce`` is differentiated in one pass
(csrc/pointwise.h). All that a backward uses was saved by its forward.

Shape legend: B batch, C channels, G groups, K kernel size, H W input size, Ho Wo output size, R hidden channels.
"""

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import cpu, differentiable, norm

Kept = tuple[Tensor, ...]


def computes(x: Tensor, *weights: Tensor) -> bool:
    """Whether layers with these weights compute in the type of ``x``: they have it, or autocast gives it to them."""
    types = [x.dtype]
    if torch.is_autocast_enabled("cpu"):
        if x.dtype != torch.get_autocast_dtype("cpu"):
            return False
        types.append(torch.float32)
    return all(weight.dtype in types for weight in weights)


def _like(x: Tensor, *weights: Tensor | None) -> list[Any]:
    """In the type of ``x``, as under autocast."""
    return [None if weight is None else weight.to(x.dtype) for weight in weights]


class Convolution(NamedTuple):
    """A convolution's options; operands: weight, bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Kept]:
        """The output and what the backward needs besides the operands."""
        return self.again((), x, weight, bias), ()

    def backward(self, grad: Tensor, kept: Kept, needs: list[bool], x: Tensor, *operands: Tensor | None) -> list[Any]:
        """Gradients of x and the operands."""
        weight, bias = _like(x, *operands)
        sizes = None if bias is None else bias.shape
        options = self.stride, self.padding, self.dilation, False, (0,) * len(self.stride), self.groups
        return [*torch.ops.aten.convolution_backward(grad, x, weight, sizes, *options, needs)]

    def again(self, kept: Kept, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The output once more, by operators that can be differentiated any number of times."""
        weight, bias = _like(x, weight, bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


class Involution(NamedTuple):
    """An involution layer's options; operands: reduce, BatchNorm's weight and bias, span, its bias."""

    kernel_size: int
    stride: int
    dilation: int
    problem: norm.Norm  #: of the generator's BatchNorm

    def forward(
        self,
        x: Tensor,
        reduce: Tensor,
        weight: Tensor,
        bias: Tensor,
        span: Tensor,
        span_bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
    ) -> tuple[Tensor, Kept]:
        """The output and what the backward needs besides the operands."""
        reduced = F.conv2d(self._pool(x), *_like(x, reduce)).contiguous(memory_format=torch.channels_last)
        hidden, coefficients = norm.forward(reduced, weight, bias, mean, var, self.problem)
        return cpu.span_forward(x, hidden, span, span_bias, *self._window()), (reduced, coefficients)

    def backward(self, grad: Tensor, kept: Kept, needs: list[bool], x: Tensor, *operands: Any) -> list[Any]:
        """Gradients of x and the operands; that of ``reduce`` is the last step."""
        reduce, weight, bias, span, span_bias = operands
        reduced, coefficients = kept
        hidden = norm.remake(reduced, coefficients)
        grad_x, grad_hidden, *grad_span = cpu.span_backward(grad, x, hidden, span, span_bias, *self._window())
        grads = norm.backward(grad_hidden, reduced, weight, bias, coefficients, self.problem)
        grad_reduced, *grad_norm = grads[:3]
        grad_reduce, pooled = torch.empty(reduce.shape, dtype=cpu.wide(x.dtype)), self._pool(x)
        grad_pooled = grad_x if pooled is x else torch.empty_like(pooled)
        rows, channels = pooled.numel() // pooled.shape[1], pooled.shape[1]
        problem = _Pointwise(rows, channels, reduced.shape[1], int(pooled is x), torch.get_num_threads())
        tensors = grad_reduced, pooled, reduce.to(x.dtype).contiguous(), grad_pooled, grad_reduce
        cpu.call("pointwise_backward", x.dtype, problem, *tensors)
        if pooled is not x:
            side = [self.stride, self.stride]
            grad_x += torch.ops.aten.avg_pool2d_backward(grad_pooled, x, side, side, [0, 0], True, False, None)
        return [grad_x, grad_reduce.to(reduce.dtype), *grad_norm, *grad_span]

    def again(self, kept: Kept, x: Tensor, *operands: Any) -> Tensor:
        """The output once more, by operators that can be differentiated any number of times."""
        reduce, weight, bias, span, span_bias = operands
        reduce, span, span_bias = _like(x, reduce, span, span_bias)
        reduced = F.conv2d(self._pool(x), reduce)
        hidden = norm.again(reduced, weight, bias, kept[1], self.problem).relu()
        return differentiable.span_involution2d(x, hidden, span, span_bias, self._window())

    def _window(self) -> tuple[int, int, int, int]:
        return self.kernel_size, self.stride, self.dilation * (self.kernel_size - 1) // 2, self.dilation

    def _pool(self, x: Tensor) -> Tensor:
        """As ``kernel_generation.stride_pool``."""
        if self.stride == 1:
            return x
        return F.avg_pool2d(x, self.stride, self.stride, 0, True, False).contiguous(memory_format=torch.channels_last)


class _Pointwise(ctypes.Structure):
    """csrc/pointwise.h has its mirror."""

    _fields_ = [(name, ctypes.c_int64) for name in ("rows", "channels", "hidden", "add", "threads")]


class Step(NamedTuple):
    """A layer of one call: its options and its operands."""

    options: Convolution | Involution
    operands: tuple[Tensor | None, ...]
    statistics: tuple[Tensor | None, ...] = ()  #: running mean and variance, for the forward alone


def run(x: Tensor, step: Step, batch_norm: nn.BatchNorm2d | None = None) -> Tensor:
    """``step(x)``, or ``step(relu(batch_norm(x)))`` for what ``norm.supports``."""
    if batch_norm is None:
        return _Layer.apply(x, None, None, None, None, step.options, step.statistics, *step.operands)
    weights, statistics = (batch_norm.weight, batch_norm.bias), (batch_norm.running_mean, batch_norm.running_var)
    problem = norm.describe(batch_norm, x)
    return _Layer.apply(x, *weights, statistics, problem, step.options, step.statistics, *step.operands)


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        statistics: tuple[Tensor, Tensor],
        problem: norm.Norm | None,
        options: Convolution | Involution,
        step_statistics: tuple[Tensor | None, ...],
        *operands: Tensor,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):  # what it is given has its type, and keeps it
            seen, coefficients = (x, None) if problem is None else norm.forward(x, weight, bias, *statistics, problem)
            out, kept = options.forward(seen, *operands, *step_statistics)
        differentiable.keep(ctx, x, weight, bias, coefficients, *operands, *kept)
        ctx.problem, ctx.options, ctx.operands = problem, options, len(operands)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, coefficients, *rest = differentiable.kept(ctx)
        operands, kept = rest[: ctx.operands], tuple(rest[ctx.operands :])
        nothing = None, None, None, None  # statistics, problem, options, the step's statistics
        if differentiable.again(grad):

            def function(x: Tensor, weight: Tensor, bias: Tensor, *operands: Tensor) -> Tensor:
                seen = x if coefficients is None else norm.again(x, weight, bias, coefficients, ctx.problem).relu()
                return ctx.options.again(kept, seen, *operands)

            grads = differentiable.gradients(function, grad, x, weight, bias, *operands)
            return *grads[:3], *nothing, *grads[3:]
        seen = x if coefficients is None else norm.remake(x, coefficients)
        needs = [True, *ctx.needs_input_grad[-ctx.operands :]]
        grad_seen, *grads = ctx.options.backward(grad, kept, needs, seen, *operands)
        if coefficients is None:
            return grad_seen, None, None, *nothing, *grads
        return *norm.backward(grad_seen, x, weight, bias, coefficients, ctx.problem)[:3], *nothing, *grads
