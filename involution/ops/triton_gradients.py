"""Triton kernels of the involution's other gradients: of the kernels (plain), of reduced, weight and bias (fused).

Letters as in triton_kernels.py.  All three begin with the same product over a group's channels,
    products[q, i] = sum_c x[c, q] grad[c, i]     (Q input columns x 8 output pixels, one row of taps),
of which the tap of pixel i with column q is the gradient of that kernel value.  The plain operator stores those; the
fused one gathers them into rows of taps and multiplies by weight (-> reduced) or by reduced (-> weight) at once.
"""

import triton
import triton.language as tl

from .triton_kernels import by_group, group_channels, load_row, load_weight, tap_rows_of, taps_at, windows


@triton.jit
def products_of(x, grad, x_strides, grad_strides, b, y, x0, ok, u, block, H, W, WO, G, GC: tl.constexpr,
                S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, BC: tl.constexpr,
                WIDE: tl.constexpr, ACC: tl.constexpr, J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """Tap row u of the products of J windows x GB groups: (J * GB, Q, 8)."""
    iy = y * S - P + u * D
    row_ok = ok & (iy >= 0) & (iy < H)
    acc = tl.zeros((J * GB, Q, 8), ACC)
    for chunk in tl.static_range((GC + BC - 1) // BC):
        channel, channel_ok = group_channels(block, chunk, G, GC, GB, BC, WIDE)
        tile = by_group(load_row(x, x_strides, b, iy, x0 * S - P, row_ok, W, channel, channel_ok, J, Q), J, GB)
        g = by_group(load_row(grad, grad_strides, b, y, x0, ok, WO, channel, channel_ok, J, 8), J, GB)
        acc = tl.dot(tl.permute(tile, (0, 2, 1)), g, acc, input_precision="ieee", out_dtype=ACC)
    return acc


@triton.jit
def tap_rows(products, J: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, S: tl.constexpr,
             D: tl.constexpr):  # fmt: skip
    """(J * GB, Q, 8) -> (J * 8, GB * KP): for every pixel and group its KP taps (those from K on are arbitrary)."""
    Q: tl.constexpr = products.shape[1]
    rows = tl.permute(tl.reshape(products, (J, GB, Q, 8)), (0, 3, 1, 2))
    pixel = tl.arange(0, J * 8 * GB) // GB % 8
    tap = tl.minimum(tl.arange(0, KP), K - 1)
    index = (pixel * S)[:, None] + (tap * D)[None, :]
    return tl.reshape(tl.gather(tl.reshape(rows, (J * 8 * GB, Q)), index, 1), (J * 8, GB * KP))


@triton.jit(do_not_specialize=["total"])
def grad_kernel_kernel(x, grad, out, x_strides, grad_strides, out_strides, total, H, W, HO, WO, G: tl.constexpr,
                       GC: tl.constexpr, K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr,
                       Q: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, J: tl.constexpr,
                       GB: tl.constexpr):  # fmt: skip
    """out (B, G, K, K, Ho, Wo) = gradient of the kernels of the plain operator."""
    blocks: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    block = pid % blocks
    b, y, x0, ok = windows(pid // blocks * J, HO, tl.cdiv(WO, 8), total, J, WIDE)
    pixel = tl.arange(0, 8)
    tap, tap_ok = taps_at(tl.arange(0, Q)[None, :] - (pixel * S)[:, None], K, D)
    column = x0[:, None] + pixel[None, :]
    group = block * GB + tl.arange(0, GB)
    place = (b * out_strides[0] + y * out_strides[4])[:, None] + column * out_strides[5]
    place = place[:, :, None, None] + (group * out_strides[1])[None, None, :, None]
    place += (tap * out_strides[3])[None, :, None, :]  # (J, 8, GB, Q)
    mask = (ok[:, None] & (column < WO))[:, :, None, None] & (group < G)[None, None, :, None] & tap_ok[None, :, None, :]
    for u in range(K):
        products = products_of(x, grad, x_strides, grad_strides, b, y, x0, ok, u, block, H, W, WO, G, GC, S, P, D, Q,
                               BC, WIDE, ACC, J, GB)  # fmt: skip
        rows = tl.permute(tl.reshape(products, (J, GB, Q, 8)), (0, 3, 1, 2))
        tl.store(out + (place + u * out_strides[2]), rows.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total"])
def grad_reduced_kernel(x, grad, weight, out, x_strides, grad_strides, out_strides, total, H, W, HO, WO,
                        G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr, K: tl.constexpr, S: tl.constexpr,
                        P: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, KP: tl.constexpr, RP: tl.constexpr,
                        BC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, J: tl.constexpr,
                        GB: tl.constexpr):  # fmt: skip
    """out (B, R, Ho, Wo) = gradient of reduced: a program sums over all groups and taps of its pixels."""
    b, y, x0, ok = windows(tl.program_id(0) * J, HO, tl.cdiv(WO, 8), total, J, WIDE)
    acc = tl.zeros((J * 8, RP), ACC)
    for block in range((G + GB - 1) // GB):
        for u in range(K):
            products = products_of(x, grad, x_strides, grad_strides, b, y, x0, ok, u, block, H, W, WO, G, GC, S, P, D,
                                   Q, BC, WIDE, ACC, J, GB)  # fmt: skip
            rows = tap_rows(products.to(x.dtype.element_ty), J, GB, K, KP, S, D)
            tap, tap_ok = tap_rows_of(u, block, G, K, KP, GB)
            w = load_weight(weight, tap, tap_ok, R, RP)
            acc = tl.dot(rows, tl.permute(w, (1, 0)), acc, input_precision="ieee", out_dtype=ACC)
    r = tl.arange(0, RP)
    column = x0[:, None] + tl.arange(0, 8)[None, :]
    offset = (b * out_strides[0] + y * out_strides[2])[:, None] + column * out_strides[3]
    offset = offset[:, :, None] + (r * out_strides[1])[None, None, :]
    mask = (ok[:, None] & (column < WO))[:, :, None] & (r < R)[None, None, :]
    tl.store(out + offset, tl.reshape(acc, (J, 8, RP)).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total", "parts"])
def grad_weight_kernel(x, grad, reduced, weight_parts, bias_parts, x_strides, grad_strides, reduced_strides, total,
                       parts, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                       S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, KP: tl.constexpr,
                       RP: tl.constexpr, BC: tl.constexpr, UB: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
                       J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """weight_parts (parts, G * K * K, R), bias_parts (parts, G * K * K): sums over the windows of each part.

    The parts are added by a second kernel in a fixed order, so the same bits come out every run (atomics would not).
    A program keeps UB rows of taps x GB groups in registers while it walks through its windows."""
    rows_of_u: tl.constexpr = (K + UB - 1) // UB
    blocks: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    u0, block, part = pid % rows_of_u * UB, pid // rows_of_u % blocks, pid // (rows_of_u * blocks)
    r = tl.arange(0, RP)
    sums, bias_sums = (), ()
    for _ in tl.static_range(UB):
        sums = sums + (tl.zeros((RP, GB * KP), ACC),)
        bias_sums = bias_sums + (tl.zeros((16, GB * KP), ACC),)
    steps = tl.cdiv(tl.cdiv(total, J), parts)
    for step in range(steps):
        b, y, x0, ok = windows((part * steps + step) * J, HO, tl.cdiv(WO, 8), total, J, WIDE)
        hidden = tl.reshape(load_row(reduced, reduced_strides, b, y, x0, ok, WO, r, r < R, J, 8), (J * 8, RP))
        ones = tl.full((16, J * 8), 1, hidden.dtype)
        new, new_bias = (), ()
        for i in tl.static_range(UB):
            products = products_of(x, grad, x_strides, grad_strides, b, y, x0, ok, u0 + i, block, H, W, WO, G, GC, S,
                                   P, D, Q, BC, WIDE, ACC, J, GB)  # fmt: skip
            taps = tap_rows(products.to(hidden.dtype), J, GB, K, KP, S, D)
            new = new + (tl.dot(tl.permute(hidden, (1, 0)), taps, sums[i], input_precision="ieee", out_dtype=ACC),)
            if bias_parts is not None:  # a sum over pixels that stays on the tensor cores
                new_bias = new_bias + (tl.dot(ones, taps, bias_sums[i], input_precision="ieee", out_dtype=ACC),)
            else:
                new_bias = new_bias + (bias_sums[i],)
        sums, bias_sums = new, new_bias
    for i in tl.static_range(UB):
        if u0 + i < K:
            tap, tap_ok = tap_rows_of(u0 + i, block, G, K, KP, GB)
            place = part * (G * K * K) + tap
            tl.store(weight_parts + (place[None, :] * R + r[:, None]), sums[i], mask=tap_ok[None, :] & (r < R)[:, None])
            if bias_parts is not None:  # all 16 rows are the same sum
                tl.store(bias_parts + place, tl.max(bias_sums[i], 0), mask=tap_ok)
