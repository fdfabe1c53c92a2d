# mypy: ignore-errors
"""Triton kernels of the involution: forward and the gradient of its input, plain and fused with the span convolution.

B images, C channels, G groups, GC = C / G channels a group, K taps a side, H x W input, Ho x Wo output, R reduced
channels, S stride, P padding, D dilation.  A *run* is RUN (at most 8) neighbouring pixels of one row.  A program works on
J runs x GB groups; its N = J * GB rows (run, group) are spread over the threads with BC channels each:

    for every row u of taps:  taps[i][v] = kernel values of pixel i of the run      (N,) registers, see below
        for every column q that the run touches:  x_q = input column                (N, BC) registers, loaded once
            for every pixel i of the run:  acc[i] += x_q * taps[i][v],  v = (q - i S) / D

A column is loaded and widened to float32 once for all pixels of the run: 13 loads for 49 multiply-adds at RUN = K = 7,
where one thread per output needs 49.  Runs of 7 divide 56, 28, 14 and 7 evenly.  All multiply-adds run on the ordinary
cores in float32.  (The same sum as a banded matrix product on the tensor cores was built too: it executes 20 % fewer
instructions, but moves 2.5 times the bytes through shared memory, which then bounds it.)

Plain, taps is read from memory.  Fused, taps = reduced[8 J pixels, R] @ weight[R, GB x KP taps of row u] + bias, made by
the tensor cores, dealt out to the threads that need it, and never written to memory.
"""

import triton
import triton.language as tl


@triton.constexpr_function
def tap_at(distance, K, D):
    """The tap at this distance from the first one (D apart), -1 if there is none."""
    return distance // D if distance >= 0 and distance % D == 0 and distance // D < K else -1


@triton.jit
def runs(first, rows, width, total, J: tl.constexpr, REPEAT: tl.constexpr, RUN: tl.constexpr, WIDE: tl.constexpr):
    """Image, row, first column and validity of runs first .. first + J, each REPEAT times: (J * REPEAT,).  Rows run
    fastest: a program works on a vertical strip (J + 6 input rows for J of output), and small images fill it too."""
    n = first + tl.arange(0, J * REPEAT) // REPEAT
    ok = n < total
    if WIDE:
        n = n.to(tl.int64)
    strip = n // rows
    per_row = tl.cdiv(width, RUN)
    return strip // per_row, n % rows, strip % per_row * RUN, ok


@triton.jit
def channels(block, chunk, G, GC: tl.constexpr, GB: tl.constexpr, BC: tl.constexpr, J: tl.constexpr,
             WIDE: tl.constexpr):  # fmt: skip
    """Channels (N, BC) of the rows (run, group), and their validity."""
    group = block * GB + tl.arange(0, J * GB) % GB
    within = chunk * BC + tl.arange(0, BC)
    if WIDE:
        group = group.to(tl.int64)
    return group[:, None] * GC + within[None, :], (group < G)[:, None] & (within < GC)[None, :]


@triton.jit
def group_ok(block, G, J: tl.constexpr, GB: tl.constexpr):
    return block * GB + tl.arange(0, J * GB) % GB < G


@triton.jit
def columns_from(x, ok, width):
    """First column of every row; of rows that are not valid, one so far off that no column counts as inside."""
    tl.assume(width > 0)
    return tl.where(ok, x, -(1 << 30))


@triton.jit
def load_column(pointers, x, q, width, channel_ok, STEP: tl.constexpr, EVEN: tl.constexpr, ACC: tl.constexpr):
    """Column x + q of each row: (N, BC), zero outside the image."""
    mask = ((x + q >= 0) & (x + q < width))[:, None]
    if not EVEN:
        mask = mask & channel_ok
    return tl.load(pointers + q * STEP, mask=mask, other=0.0).to(ACC)


@triton.jit
def tap_numbers(u, block, G, K: tl.constexpr, KP: tl.constexpr, GB: tl.constexpr):
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
def load_reduced(reduced, strides, b, y, x, ok, width, R, J: tl.constexpr, RP: tl.constexpr):
    """reduced at 8 columns from x of J runs (their b, y, x, ok): (8 J, RP)."""
    r = tl.arange(0, RP)
    column = x[:, None] + tl.arange(0, 8)[None, :]
    mask = ok[:, None] & (column >= 0) & (column < width)
    offset = (b * strides[0] + y * strides[2])[:, None] + column * strides[3]
    offset = offset[:, :, None] + (r * strides[1])[None, None, :]
    return tl.reshape(tl.load(reduced + offset, mask=mask[:, :, None] & (r < R)[None, None, :], other=0.0), (J * 8, RP))


@triton.jit
def unpack(tile, LEVELS: tl.constexpr):
    """(N, 2 ** LEVELS) -> a tuple of 2 ** LEVELS tensors (N,): every thread gets its rows' values in registers."""
    N: tl.constexpr = tile.shape[0]
    parts = (tile,)
    for level in tl.static_range(LEVELS):
        even, odd = (), ()
        for j in tl.static_range(2**level):
            a, b = tl.split(tl.reshape(parts[j], (N, 2 ** (LEVELS - 1 - level), 2)))
            even, odd = even + (a,), odd + (b,)
        parts = even + odd
    values = ()
    for j in tl.static_range(2**LEVELS):
        values = values + (tl.reshape(parts[j], (N,)),)
    return values


@triton.jit
def made_taps(hidden, weight, bias, u, block, G, R, K: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr,
              GB: tl.constexpr, RP: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """Tap row u at the 8 J pixels of hidden: value v of column c is number v * 8 + c of 8 * KP tensors (N,)."""
    tap, ok = tap_numbers(u, block, G, K, KP, GB)
    made = tl.dot(hidden, load_weight(weight, tap, ok, R, RP), input_precision="ieee", out_dtype=ACC)
    if bias is not None:
        made += tl.load(bias + tap, mask=ok, other=0.0).to(ACC)[None, :]
    made = tl.permute(tl.reshape(made, (J, 8, GB, KP)), (0, 2, 3, 1))
    return unpack(tl.reshape(made, (J * GB, 8 * KP)), 3 + LOG_KP)


@triton.jit
def tap_pointers(kernel, strides, b, x, block, J: tl.constexpr, GB: tl.constexpr, KP: tl.constexpr):
    """Where the taps of the rows' (N,) first columns are, but for y and u: (N, KP)."""
    group = block * GB + tl.arange(0, J * GB) % GB
    place = b * strides[0] + group * strides[1] + x * strides[5]
    return kernel + (place[:, None] + (tl.arange(0, KP) * strides[3])[None, :])


@triton.jit
def stored_taps(pointers, x, width, COLUMNS: tl.constexpr, STEP: tl.constexpr, K: tl.constexpr,
                LOG_KP: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The same from memory: the first COLUMNS columns from x, zeros outside and for further ones."""
    N: tl.constexpr = pointers.shape[0]
    KP: tl.constexpr = pointers.shape[1]
    tiles = ()
    for c in tl.static_range(8):
        if c < COLUMNS:
            mask = ((x + c >= 0) & (x + c < width))[:, None] & (tl.arange(0, KP) < K)[None, :]
            tiles = tiles + (tl.load(pointers + c * STEP, mask=mask, other=0.0).to(ACC),)
        else:
            tiles = tiles + (tl.zeros((N, KP), ACC),)
    return unpack(pack(tiles, KP, 3), 3 + LOG_KP)


@triton.jit
def pack(values, M: tl.constexpr, LEVELS: tl.constexpr):
    """2 ** LEVELS tensors (N, M) -> (N, M * 2 ** LEVELS), their number running fastest; the inverse of unpack."""
    N: tl.constexpr = values[0].shape[0]
    for level in tl.static_range(LEVELS):
        joined = ()
        for j in tl.static_range(2 ** (LEVELS - 1 - level)):
            pair = tl.join(values[j], values[j + 2 ** (LEVELS - 1 - level)])
            joined = joined + (tl.reshape(pair, (N, M * 2 ** (level + 1))),)
        values = joined
    return values[0]


@triton.jit
def store_run(out, strides, acc, b, y, x, width, channel, channel_ok, RUN: tl.constexpr):
    """Write RUN tensors (N, BC) to neighbouring columns from x (rows that are not valid have x past the end)."""
    pointers = out + ((b * strides[0] + y * strides[2] + x * strides[3])[:, None] + channel * strides[1])
    for i in tl.static_range(RUN):
        mask = (x + i < width)[:, None] & channel_ok
        tl.store(pointers + i * strides[3], acc[i].to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["total"])
def forward_kernel(x, kernel, reduced, weight, bias, out, x_strides, kernel_strides, reduced_strides, out_strides,
                   total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr, K: tl.constexpr,
                   S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KP: tl.constexpr, LOG_KP: tl.constexpr,
                   RP: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr, STEP: tl.constexpr, KSTEP: tl.constexpr,
                   WIDE: tl.constexpr, ACC: tl.constexpr, J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
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
        hidden = load_reduced(reduced, reduced_strides, bj, yj, xj, okj, WO, R, J, RP)
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
            taps = made_taps(hidden, weight, bias, u, block, G, R, K, KP, LOG_KP, GB, RP, J, ACC)
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


@triton.jit(do_not_specialize=["total"])
def grad_input_kernel(grad, kernel, reduced, weight, bias, out, grad_strides, kernel_strides, reduced_strides,
                      out_strides, total, H, W, HO, WO, G: tl.constexpr, GC: tl.constexpr, R: tl.constexpr,
                      K: tl.constexpr, S: tl.constexpr, P: tl.constexpr, D: tl.constexpr, KP: tl.constexpr,
                      LOG_KP: tl.constexpr, RP: tl.constexpr, BC: tl.constexpr, RUN: tl.constexpr,
                      STEP: tl.constexpr, KSTEP: tl.constexpr, WIDE: tl.constexpr, ACC: tl.constexpr,
                      J: tl.constexpr, GB: tl.constexpr):  # fmt: skip
    """out = gradient of x, gathered by runs of input pixels from the output columns whose kernels touch them: no atomics,
    the same bits every run.  RUN is a multiple of S, so which tap meets which pixel is known when compiling.

    Fused, each run makes tap row u of the (RUN - 1 + (K - 1) D) / S + 1 = 13 output pixels of row y + P - u D again: 13/7
    of the forward's products, not 7 x 13/7, because a row of output is met by one row of taps only."""
    chunks: tl.constexpr = (GC + BC - 1) // BC
    blocks: tl.constexpr = (G + GB - 1) // GB
    EVEN: tl.constexpr = G % GB == 0 and GC % BC == 0
    pid = tl.program_id(0)
    chunk, block, first = pid % chunks, pid // chunks % blocks, pid // (chunks * blocks) * J
    b, y, x0, ok = runs(first, H, W, total, J, GB, RUN, WIDE)
    channel, channel_ok = channels(block, chunk, G, GC, GB, BC, J, WIDE)
    bj, yj, xj, okj = runs(first, H, W, total, J, 1, RUN, WIDE)
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
    for u in range(K):
        reach = y + P - u * D
        row_ok = ok & (reach >= 0) & (reach // S < HO) & (reach % S == 0)
        pointers = origin + (reach // S * grad_strides[2])[:, None]
        inside = columns_from(left, row_ok, WO)
        for part in tl.static_range((touched + 7) // 8):
            if reduced is not None:
                reach_j = yj + P - u * D
                okr = okj & (reach_j >= 0) & (reach_j // S < HO) & (reach_j % S == 0)
                xr = xj // S + start + part * 8
                hidden = load_reduced(reduced, reduced_strides, bj, reach_j // S, xr, okr, WO, R, J, RP)
                taps = made_taps(hidden, weight, bias, u, block, G, R, K, KP, LOG_KP, GB, RP, J, ACC)
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
