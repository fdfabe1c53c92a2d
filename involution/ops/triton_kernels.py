"""Triton kernels of the involution: forward and the gradient of its input, plain and fused with the span convolution.

B images, G groups, GC = C / G channels a group, K taps a side, H x W input, Ho x Wo output, R reduced channels,
S stride, P padding, D dilation.  A *window* is WINDOW = 8 neighbouring pixels of one row and the Q (a power of two)
columns of the other tensor that they touch.  A program handles J windows x GB groups (x BC channels).

The channels of a group share their kernels, so over one row of taps the 8 results of a window are a small matrix
product:  out[c, i] += sum_q x[c, q] band[q, i],  band[q, i] = kernel[pixel i, tap with column q, or 0].
It runs on the tensor cores in 16 x 16 x 8 steps of which 7/16 is work (K = 7).  The alternative, one multiply-add a tap
on the ordinary cores, needs 49 loads and 49 conversions a value and is bound by them at 2-4 times the time that the
memory needs.  Price: a value that is not finite reaches all 8 results of the windows that touch it (0 x inf), where the
reference lets it reach K x K of them.

Fused, kernel[8 J pixels, GB x KP taps of row u] = reduced[8 J, R] @ weight[R, GB x KP] + bias lives in registers (rounded
to the input's type, as a stored kernel would be) and becomes the band by a gather inside the program.
"""

import triton
import triton.language as tl

WINDOW = 8  # the smallest N of the tensor cores' matrix product


@triton.jit
def windows(first, rows, per_row, total, J: tl.constexpr, WIDE: tl.constexpr):
    """The images, rows and first columns of windows first .. first + J: rows fastest, so that a program works on a
    vertical strip of 8 columns (J + 6 rows of input for J of output) and small images fill it too."""
    n = first + tl.arange(0, J)
    inside = n < total
    if WIDE:
        n = n.to(tl.int64)
    strip = n // rows
    return strip // per_row, n % rows, (strip % per_row) * 8, inside


@triton.jit
def group_channels(block, chunk, G, GC: tl.constexpr, GB: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr):
    """Channel numbers (GB * BC,) and their validity for a block of groups and a chunk of each group's channels."""
    lane = tl.arange(0, GB * BC)
    if WIDE:
        lane = lane.to(tl.int64)
    if GC == BC:
        channel = block * (GB * BC) + lane  # one run: the compiler sees that it is contiguous and loads 16 bytes
        return channel, channel < G * GC
    within = chunk * BC + lane % BC
    group = block * GB + lane // BC
    return group * GC + within, (within < GC) & (group < G)


@triton.jit
def load_row(ptr, strides, b, y, x, ok, width, channel, channel_ok, J: tl.constexpr, Q: tl.constexpr):
    """Q columns from column x of row y at the given channels, zeros outside: (J, Q, channels)."""
    column = x[:, None] + tl.arange(0, Q)[None, :]
    offset = (b * strides[0] + y * strides[2])[:, None] + column * strides[3]
    mask = ok[:, None] & (column >= 0) & (column < width)
    offset = offset[:, :, None] + (channel * strides[1])[None, None, :]
    return tl.load(ptr + offset, mask=mask[:, :, None] & channel_ok[None, None, :], other=0.0)


@triton.jit
def by_group(tile, J: tl.constexpr, GB: tl.constexpr):
    """(J, Q, GB * BC) -> (J * GB, BC, Q), one matrix a window and group."""
    BC: tl.constexpr = tile.shape[2] // GB
    tile = tl.permute(tl.reshape(tile, (J, tile.shape[1], GB, BC)), (0, 2, 3, 1))
    return tl.reshape(tile, (J * GB, BC, tile.shape[3]))


@triton.jit
def tap_rows_of(u, block, G, K: tl.constexpr, KP: tl.constexpr, GB: tl.constexpr):
    """Rows of the span weight that make tap row u of a block of groups, and their validity: (GB * KP,)."""
    lane = tl.arange(0, GB * KP)
    group = block * GB + lane // KP
    return (group * K + u) * K + lane % KP, (lane % KP < K) & (group < G)


@triton.jit
def load_weight(weight, tap, ok, R, RP: tl.constexpr):
    """Those rows of the span weight (G * K * K, R), transposed: (RP, GB * KP)."""
    r = tl.arange(0, RP)
    return tl.load(weight + (tap[None, :] * R + r[:, None]), mask=ok[None, :] & (r < R)[:, None], other=0.0)


@triton.jit
def generate(hidden, weight, bias, u, block, G, R, K: tl.constexpr, KP: tl.constexpr, GB: tl.constexpr,
             RP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Tap row u of the kernels of a block of groups at M pixels: hidden (M, RP) -> (M * GB, KP)."""
    tap, ok = tap_rows_of(u, block, G, K, KP, GB)
    kernel = tl.dot(hidden, load_weight(weight, tap, ok, R, RP), input_precision="ieee", out_dtype=ACC)
    if bias is not None:
        kernel += tl.load(bias + tap, mask=ok, other=0.0).to(ACC)[None, :]
    return tl.reshape(kernel.to(hidden.dtype), (hidden.shape[0] * GB, KP))


@triton.jit
def taps_at(distance, K: tl.constexpr, D: tl.constexpr):
    """The tap whose dilated distance from the first tap this is, and whether there is one."""
    tap = distance // D
    return tap, (distance >= 0) & (tap < K) & (distance % D == 0)


@triton.jit
def spread(value, N: tl.constexpr):
    """(J,) -> (J * N,), each value N times."""
    return tl.reshape(tl.broadcast_to(value[:, None], (value.shape[0], N)), (value.shape[0] * N,))


@triton.jit
def store_windows(out, strides, acc, b, y, x0, ok, width, channel, channel_ok, J: tl.constexpr, GB: tl.constexpr):
    """Write acc (J * GB, BC, 8) to the 8 pixels of the J windows."""
    BC: tl.constexpr = acc.shape[1]
    values = tl.reshape(tl.permute(tl.reshape(acc, (J, GB, BC, 8)), (0, 3, 1, 2)), (J, 8, GB * BC))
    column = x0[:, None] + tl.arange(0, 8)[None, :]
    offset = (b * strides[0] + y * strides[2])[:, None] + column * strides[3]
    mask = ok[:, None] & (column < width)
    offset = offset[:, :, None] + (channel * strides[1])[None, None, :]
    tl.store(out + offset, values.to(out.dtype.element_ty), mask=mask[:, :, None] & channel_ok[None, None, :])


@triton.jit(do_not_specialize=["total"])
def forward_kernel(x, kernel, reduced, weight, bias, out, x_strides, kernel_strides, reduced_strides, out_strides,
                   total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                   S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, KP: tl.constexpr,
                   RP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, J: tl.constexpr,
                   GB: tl.constexpr):  # fmt: skip
    """out = involution(x): windows of 8 output pixels over Q input columns; reduced is None for the plain operator."""
    chunks: tl.constexpr = (GC + BC - 1) // BC
    blocks: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)  # the groups of one place follow each other: they find the reduced tile in L2
    chunk, block = pid % chunks, pid // chunks % blocks
    b, y, x0, ok = windows(pid // (chunks * blocks) * J, HO, tl.cdiv(WO, 8), total, J, WIDE)
    channel, channel_ok = group_channels(block, chunk, G, GC, GB, BC, WIDE)
    row = tl.arange(0, J * 8 * GB)  # the band is made in rows (window, pixel, group)
    pixel = row // GB % 8
    tap, tap_ok = taps_at(tl.arange(0, Q)[None, :] - (pixel * S)[:, None], K, D)
    if reduced is not None:
        r = tl.arange(0, RP)
        hidden = tl.reshape(load_row(reduced, reduced_strides, b, y, x0, ok, WO, r, r < R, J, 8), (J * 8, RP))
        tap = tl.where(tap_ok, tap, 0)
    else:
        group = block * GB + row % GB
        place = b * kernel_strides[0] + y * kernel_strides[4] + x0 * kernel_strides[5]
        place = spread(place, 8 * GB) + pixel * kernel_strides[5] + group * kernel_strides[1]
        taps = kernel + (place[:, None] + tap * kernel_strides[3])
        tap_ok = tap_ok & ((spread(tl.where(ok, x0, WO), 8 * GB) + pixel < WO) & (group < G))[:, None]
    acc = tl.zeros((J * GB, BC, 8), ACC)
    for u in range(K):
        if reduced is not None:
            band = tl.gather(generate(hidden, weight, bias, u, block, G, R, K, KP, GB, RP, ACC), tap, 1)
            band = tl.where(tap_ok, band, 0.0)
        else:
            band = tl.load(taps + u * kernel_strides[2], mask=tap_ok, other=0.0)
        band = tl.reshape(tl.permute(tl.reshape(band, (J, 8, GB, Q)), (0, 2, 3, 1)), (J * GB, Q, 8))
        iy = y * S - P + u * D
        tile = load_row(x, x_strides, b, iy, x0 * S - P, ok & (iy >= 0) & (iy < H), W, channel, channel_ok, J, Q)
        acc = tl.dot(by_group(tile, J, GB), band, acc, input_precision="ieee", out_dtype=ACC)
    store_windows(out, out_strides, acc, b, y, x0, ok, WO, channel, channel_ok, J, GB)


@triton.jit(do_not_specialize=["total"])
def grad_input_kernel(grad, kernel, reduced, weight, bias, out, grad_strides, kernel_strides, reduced_strides,
                      out_strides, total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr,
                      K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, Q: tl.constexpr,
                      KP: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
                      J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """out = gradient of x, as a gather (no atomics, the same bits every run): windows of 8 input pixels over the Q output
    columns whose kernels touch them."""
    chunks: tl.constexpr = (GC + BC - 1) // BC
    blocks: tl.constexpr = (G + GB - 1) // GB
    pid = tl.program_id(0)
    chunk, block = pid % chunks, pid // chunks % blocks
    b, y, x0, ok = windows(pid // (chunks * blocks) * J, H, tl.cdiv(W, 8), total, J, WIDE)
    channel, channel_ok = group_channels(block, chunk, G, GC, GB, BC, WIDE)
    reach: tl.constexpr = (K - 1) * D
    # the first output column whose last tap is at x0 or after; the shift by reach keeps the division positive
    first = (x0 + P - reach + S - 1 + S * reach) // S - reach
    row = tl.arange(0, J * Q * GB)  # the band is made in rows (window, output column, group)
    column = spread(first, Q * GB) + row // GB % Q
    start = spread(x0, Q * GB) + P - column * S
    tap, tap_ok = taps_at(start[:, None] + tl.arange(0, 8)[None, :], K, D)
    if reduced is not None:
        tap = tl.where(tap_ok, tap, 0)
    else:
        group = block * GB + row % GB
        place = spread(b * kernel_strides[0], Q * GB) + column * kernel_strides[5] + group * kernel_strides[1]
        taps = kernel + (place[:, None] + tap * kernel_strides[3])
        tap_ok = tap_ok & ((column >= 0) & (column < WO) & (group < G))[:, None]
    acc = tl.zeros((J * GB, BC, 8), ACC)
    for u in range(K):
        oy = (y + P - u * D) // S
        row_ok = ok & (y + P >= u * D) & (oy < HO) & ((y + P - u * D) % S == 0)
        if reduced is not None:
            r = tl.arange(0, RP)
            hidden = load_row(reduced, reduced_strides, b, oy, first, row_ok, WO, r, r < R, J, Q)
            hidden = tl.reshape(hidden, (J * Q, RP))
            band = tl.gather(generate(hidden, weight, bias, u, block, G, R, K, KP, GB, RP, ACC), tap, 1)
            band = tl.where(tap_ok, band, 0.0)
        else:
            place = spread(oy * kernel_strides[4], Q * GB) + u * kernel_strides[2]
            band = tl.load(taps + place[:, None], mask=tap_ok & spread(row_ok, Q * GB)[:, None], other=0.0)
        band = tl.reshape(tl.permute(tl.reshape(band, (J, Q, GB, 8)), (0, 2, 1, 3)), (J * GB, Q, 8))
        tile = load_row(grad, grad_strides, b, oy, first, row_ok, WO, channel, channel_ok, J, Q)
        acc = tl.dot(by_group(tile, J, GB), band, acc, input_precision="ieee", out_dtype=ACC)
    store_windows(out, out_strides, acc, b, y, x0, ok, W, channel, channel_ok, J, GB)
