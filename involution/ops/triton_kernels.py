# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton has no star expressions)
"""Triton kernels of the involution: forward and the gradient of its input, plain and fused with the span convolution.

B images, C channels, G groups, GC = C / G channels a group, K taps a side, H x W input, Ho x Wo output, R reduced
channels, S stride, P padding, D dilation.  A *run* is RUN (at most 8) neighbouring pixels of one row.  A program works
on J runs x GB groups; its N = J * GB rows (run, group) are spread over the threads with BC channels each:

    for every row u of taps:  taps[v][i] = kernel values of pixel i of the run      (N,) registers
        for every column q that the run touches:  x_q = input column                (N, BC) registers, loaded once
            for every pixel i of the run:  acc[i] += x_q * taps[v][i],  v = (q - i S) / D

A column is loaded and widened to float32 once for all pixels of the run: 13 loads for 49 multiply-adds at RUN = K = 7,
where one thread an output needs 49.  Runs of 7 divide 56, 28, 14 and 7 evenly.  All multiply-adds are float32, on the
ordinary cores.  (As a banded matrix product on the tensor cores, built first, the compiled loop has some 20 % fewer
instructions, but by a count of bytes, not a measurement, 2.5 times the shared memory traffic, which would bind it; and
0 x inf spreads through the band.)
Plain, taps come from memory.  Fused, taps = reduced[8 J pixels, R] @ weight[R, GB x KP taps of row u] + bias in
float32: made by the tensor cores, dealt out to the threads that need them, never written to memory.

Forward, one layer of RedNet-50, batch 128, bf16, channels_last, microseconds on an H100 (docs/benchmarks/gpu.md):

    stage  C   H = W   span convolution (cuDNN)   plain   fused   its bytes at 3.0 TB/s   its instructions*
      1    64    56            353                 202     184            39                       90
      2   128    28            165                 108      83            19                       46
      3   256    14             73                  63      54            10                       24
      4   512     7             31                  37      39             5                       13

    * to issue those of the compiled sm_90 code at 1.755 GHz, before the tiles were chosen by measurement

So the multiply-adds and the work around them bind, not the bytes: half of the instructions are not multiply-adds
(widening bf16 is 13-18 % of all), and they take twice the time that issuing them would.
The backward stores the kernels' gradient for a moment: docs/benchmarks/gpu-kernels.md has what that takes.
"""

import triton
import triton.language as tl

from .triton_taps import (
    channels,
    columns_from,
    group_ok,
    load_column,
    load_reduced,
    made_taps,
    runs,
    store_run,
    stored_taps,
    tap_at,
    tap_pointers,
)


@triton.jit(do_not_specialize=["total", "H", "W", "HO", "WO"])
def forward_kernel(x, kernel, reduced, weight, bias, out, x_strides, kernel_strides, reduced_strides, out_strides,
                   total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                   S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr,
                   RP: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, KSTEP: tl.constexpr,
                   RSTEP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
                   J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """out = involution(x); reduced is None for the plain operator, kernel for the fused one.  STEP = x_strides[3]."""
    chunks: tl.constexpr = (GC + BC - 1) // BC
    blocks: tl.constexpr = (G + GB - 1) // GB
    EVEN: tl.constexpr = G % GB == 0 and GC % BC == 0  # no channel is past the last
    pid = tl.program_id(0)  # the groups of one place follow each other: they find its reduced tile in L2
    chunk, block, first = pid % chunks, pid // chunks % blocks, pid // (chunks * blocks) * J
    b, y, x0, ok = runs(first, HO, WO, total, J, GB, RUN, WIDE)
    channel, channel_ok = channels(block, chunk, G, GC, GB, BC, J, WIDE)
    if reduced is not None:
        bj, yj, xj, okj = runs(first, HO, WO, total, J, 1, RUN, WIDE)
        hidden = load_reduced(reduced, reduced_strides, bj, yj, xj, okj, WO, R, J, RP, RSTEP)
    else:
        stored = tap_pointers(kernel, kernel_strides, b, x0, block, J, GB, KP)
        tap_column = columns_from(x0, ok & group_ok(block, G, J, GB), WO)
    origin = x + ((b * x_strides[0] + (x0 * S - P) * STEP)[:, None] + channel * x_strides[1])
    acc = ()
    for _ in tl.static_range(RUN):
        acc = acc + (tl.zeros((J * GB, BC), ACC),)
    tl.assume(H > 0)
    for u in range(K):
        if reduced is not None:
            taps = made_taps(hidden, weight, bias, u, block, G, R, K, KP, LOG_KP, GB, RP, J, ACC, PRECISION)
        else:
            place = (y * kernel_strides[4] + u * kernel_strides[2])[:, None]
            taps = stored_taps(stored + place, tap_column, WO, RUN, KSTEP, K, LOG_KP, ACC)
        iy = y * S - P + u * D
        left = columns_from(x0 * S - P, ok & (iy >= 0) & (iy < H), W)
        pointers = origin + (iy * x_strides[2])[:, None]
        for q in tl.static_range((RUN - 1) * S + (K - 1) * D + 1):
            column = load_column(pointers, left, q, W, channel_ok, STEP, EVEN, ACC)
            new = ()
            for i in tl.static_range(RUN):
                if tap_at(q - i * S, K, D) >= 0:
                    new = new + (acc[i] + column * taps[tap_at(q - i * S, K, D) * 8 + i][:, None],)
                else:
                    new = new + (acc[i],)
            acc = new
    store_run(out, out_strides, acc, b, y, tl.where(ok, x0, WO), WO, channel, channel_ok, RUN)


@triton.jit(do_not_specialize=["total", "H", "W", "HO", "WO"])
def grad_input_kernel(grad, kernel, reduced, weight, bias, out, grad_strides, kernel_strides, reduced_strides,
                      out_strides, total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr,
                      K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                      LOG_KP: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
                      STEP: tl.constexpr, KSTEP: tl.constexpr, RSTEP: tl.constexpr, WIDE: tl.constexpr,
                      ACC: tl.constexpr, PRECISION: tl.constexpr,
                      J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """out = gradient of x, gathered by runs of input pixels from the output columns whose kernels touch them: no
    atomics, the same bits every run.  RUN is a multiple of S: which tap meets which pixel is known when compiling.

    Fused, each run makes tap row u of the (RUN - 1 + (K - 1) D) / S + 1 = 13 output pixels of row y + P - u D again:
    13/7 of the forward's products (with padding 16/8), not 7 x 13/7, as one row of taps meets a row of output."""
    chunks: tl.constexpr = (GC + BC - 1) // BC
    blocks: tl.constexpr = (G + GB - 1) // GB
    EVEN: tl.constexpr = G % GB == 0 and GC % BC == 0
    # a program's rows y are equal modulo S: then the same rows of taps meet all of them, every S-th (for D = 1)
    EVERY: tl.constexpr = S if D == 1 else 1
    parity, pid = tl.program_id(0) % EVERY, tl.program_id(0) // EVERY
    chunk, block, first = pid % chunks, pid // chunks % blocks, pid // (chunks * blocks) * J
    b, y, x0, ok = runs(first, tl.cdiv(H, EVERY), W, total, J, GB, RUN, WIDE)
    channel, channel_ok = channels(block, chunk, G, GC, GB, BC, J, WIDE)
    bj, yj, xj, okj = runs(first, tl.cdiv(H, EVERY), W, total, J, 1, RUN, WIDE)
    y, yj = y * EVERY + parity, yj * EVERY + parity
    ok, okj = ok & (y < H), okj & (yj < H)
    start: tl.constexpr = -(((K - 1) * D - P) // S)  # the first output column, from that of x0: ceil((P - reach) / S)
    touched: tl.constexpr = (RUN - 1 + P - start * S) // S + 1  # output columns
    left = x0 // S + start
    if reduced is None:
        stored, valid = tap_pointers(kernel, kernel_strides, b, left, block, J, GB, KP), group_ok(block, G, J, GB)
    origin = grad + ((b * grad_strides[0] + left * STEP)[:, None] + channel * grad_strides[1])
    acc = ()
    for _ in tl.static_range(RUN):
        acc = acc + (tl.zeros((J * GB, BC), ACC),)
    tl.assume(HO > 0)
    first_u = (parity + P) % EVERY
    for k in range((K - first_u + EVERY - 1) // EVERY):
        u = first_u + k * EVERY
        reach = y + P - u * D
        row_ok = ok & (reach >= 0) & (reach // S < HO) & (reach % S == 0)
        pointers = origin + (reach // S * grad_strides[2])[:, None]
        inside = columns_from(left, row_ok, WO)
        for part in tl.static_range((touched + 7) // 8):
            if reduced is not None:
                reach_j = yj + P - u * D
                okr = okj & (reach_j >= 0) & (reach_j // S < HO) & (reach_j % S == 0)
                xr = xj // S + start + part * 8
                hidden = load_reduced(reduced, reduced_strides, bj, reach_j // S, xr, okr, WO, R, J, RP, RSTEP)
                taps = made_taps(hidden, weight, bias, u, block, G, R, K, KP, LOG_KP, GB, RP, J, ACC, PRECISION)
            else:
                place = (reach // S * kernel_strides[4] + u * kernel_strides[2])[:, None] + part * 8 * KSTEP
                taps = stored_taps(stored + place, columns_from(left, row_ok & valid, WO) + part * 8, WO,
                                   touched - part * 8, KSTEP, K, LOG_KP, ACC)  # fmt: skip
            for c in tl.static_range(8):
                if part * 8 + c < touched:
                    column = load_column(pointers, inside, part * 8 + c, WO, channel_ok, STEP, EVEN, ACC)
                    new = ()
                    for i in tl.static_range(RUN):
                        if tap_at(i + P - (start + part * 8 + c) * S, K, D) >= 0:
                            tap = taps[tap_at(i + P - (start + part * 8 + c) * S, K, D) * 8 + c]
                            new = new + (acc[i] + column * tap[:, None],)
                        else:
                            new = new + (acc[i],)
                    acc = new
    store_run(out, out_strides, acc, b, y, tl.where(ok, x0, W), W, channel, channel_ok, RUN)
