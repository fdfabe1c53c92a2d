# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton has no star expressions)
"""Triton kernel of the involution's other gradient, that of the kernels.

Letters and runs as in triton_kernels.py.  For a row of taps it is sums over a group's channels,
    products[v * RUN + i] = sum_c x[column i S + v D, c] grad[pixel i, c]        (N,) each.
The fused operator stores them too, for as long as it takes to multiply them by weight (-> reduced) and by reduced
(-> weight), which are matrix products of cuDNN's: made twice on the chip instead, they took longer by prediction.
"""

import triton
import triton.language as tl

from .triton_taps import (
    channels,
    columns_from,
    group_ok,
    load_column,
    pack,
    runs,
    tap_at,
    tap_pointers,
)


@triton.jit
def load_run(grad, strides, b, y, x0, ok, width, channel, channel_ok, RUN: tl.constexpr, EVEN: tl.constexpr,
             ACC: tl.constexpr):  # fmt: skip
    """grad at the RUN pixels: a tuple of (N, BC)."""
    pointers = grad + ((b * strides[0] + y * strides[2] + x0 * strides[3])[:, None] + channel * strides[1])
    left = columns_from(x0, ok, width)
    values = ()
    for i in tl.static_range(RUN):
        values = values + (load_column(pointers, left, i, width, channel_ok, strides[3], EVEN, ACC),)
    return values


@triton.constexpr_function
def place_of(tap, pixel, K, S, D, RUN):
    """Where products_of, which goes column by column, meets this tap of this pixel."""
    pairs = [
        (q, i)
        for q in range((RUN - 1) * S + (K - 1) * D + 1)
        for i in range(RUN)
        if q >= i * S and (q - i * S) % D == 0 and (q - i * S) // D < K
    ]
    return pairs.index((pixel * S + tap * D, pixel))


@triton.jit
def add_products(totals, x, strides, grads, b, iy, column, left, channel, channel_ok, W, K: tl.constexpr,
                 S: tl.constexpr, D: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, EVEN: tl.constexpr,
                 ACC: tl.constexpr):  # fmt: skip
    """totals (none yet: an empty tuple) and the products of some channels in input row iy from `column` on."""
    pointers = x + ((b * strides[0] + iy * strides[2] + column * STEP)[:, None] + channel * strides[1])
    sums = ()
    for q in tl.static_range((RUN - 1) * S + (K - 1) * D + 1):
        values = load_column(pointers, left, q, W, channel_ok, STEP, EVEN, ACC)
        for i in tl.static_range(RUN):
            if tap_at(q - i * S, K, D) >= 0:
                product = tl.sum(values * grads[i], 1)
                if len(totals) > 0:
                    product += totals[place_of(tap_at(q - i * S, K, D), i, K, S, D, RUN)]
                sums = sums + (product,)
    return sums


@triton.jit
def products_of(x, grad, x_strides, grad_strides, grads, b, y, x0, ok, u, block, H, W, WO, G, GC: tl.constexpr,
                K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                BC: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
                J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """Tap row u: KP * RUN tensors (N, 1), zeros for taps from K on.  grads: of the group's channels, unless they are
    more than BC: then they are loaded here, BC at a time."""
    EVEN: tl.constexpr = G % GB == 0 and GC % BC == 0
    tl.assume(H > 0)
    iy = y * S - P + u * D
    column = x0 * S - P
    left = columns_from(column, ok & (iy >= 0) & (iy < H), W)
    totals = ()
    if GC > BC:
        for _ in tl.static_range(RUN * K):
            totals = totals + (tl.zeros((J * GB,), ACC),)
        for chunk in range((GC + BC - 1) // BC):  # a loop for the compiler too: unrolled, it takes minutes
            channel, channel_ok = channels(block, chunk, G, GC, GB, BC, J, WIDE)
            some = load_run(grad, grad_strides, b, y, x0, ok, WO, channel, channel_ok, RUN, EVEN, ACC)
            totals = add_products(totals, x, x_strides, some, b, iy, column, left, channel, channel_ok, W, K, S, D,
                                  RUN, STEP, EVEN, ACC)  # fmt: skip
    else:
        channel, channel_ok = channels(block, 0, G, GC, GB, BC, J, WIDE)
        totals = add_products(totals, x, x_strides, grads, b, iy, column, left, channel, channel_ok, W, K, S, D, RUN,
                              STEP, EVEN, ACC)  # fmt: skip
    products = ()
    for n in tl.static_range(KP * RUN):
        if n // RUN < K:
            products = products + (totals[place_of(n // RUN, n % RUN, K, S, D, RUN)][:, None],)
        else:
            products = products + (tl.zeros((J * GB, 1), ACC),)
    return products


@triton.jit(do_not_specialize=["total", "H", "W", "HO", "WO"])
def grad_kernel_kernel(x, grad, out, x_strides, grad_strides, out_strides, total, H, W, HO, WO, G: tl.constexpr,
                       GC: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                       KP: tl.constexpr, LOG_KP: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
                       STEP: tl.constexpr, KSTEP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
                       J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """out (B, G, K, K, Ho, Wo) = gradient of the kernels of the plain operator.  KSTEP = out_strides[5]."""
    blocks: tl.constexpr = (G + GB - 1) // GB
    EVEN: tl.constexpr = G % GB == 0 and GC % BC == 0
    pid = tl.program_id(0)
    block = pid % blocks
    b, y, x0, ok = runs(pid // blocks * J, HO, WO, total, J, GB, RUN, WIDE)
    channel, channel_ok = channels(block, 0, G, GC, GB, BC, J, WIDE)
    grads = load_run(grad, grad_strides, b, y, x0, ok, WO, channel, channel_ok, RUN, EVEN, ACC)
    pointers = tap_pointers(out, out_strides, b, x0, block, J, GB, KP) + (y * out_strides[4])[:, None]
    inside = columns_from(x0, ok & group_ok(block, G, J, GB), WO)
    for u in range(K):
        products = products_of(x, grad, x_strides, grad_strides, grads, b, y, x0, ok, u, block, H, W, WO, G, GC, K, S,
                               P, D, KP, BC, RUN, STEP, WIDE, ACC, J, GB)  # fmt: skip
        for i in tl.static_range(RUN):
            taps = ()
            for v in tl.static_range(KP):
                taps = taps + (products[v * RUN + i],)
            mask = ((inside + i >= 0) & (inside + i < WO))[:, None] & (tl.arange(0, KP) < K)[None, :]
            values = pack(taps, 1, LOG_KP).to(out.dtype.element_ty)
            tl.store(pointers + (u * out_strides[2] + i * KSTEP), values, mask=mask)
