# mypy: ignore-errors
# ruff: noqa: RUF005 (Triton has no star expressions)
"""Parts of the Triton kernels: where runs of pixels are, loads of columns, and taps in registers.

Letters as in triton_kernels.py.
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
def load_reduced(reduced, strides, b, y, x, ok, width, R, J: tl.constexpr, RP: tl.constexpr, RSTEP: tl.constexpr):
    """reduced at 8 columns from x of J runs (their b, y, x, ok): (8 J, RP)."""
    r = tl.arange(0, RP)
    column = x[:, None] + tl.arange(0, 8)[None, :]
    mask = ok[:, None] & (column >= 0) & (column < width)
    offset = (b * strides[0] + y * strides[2])[:, None] + column * RSTEP
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
              GB: tl.constexpr, RP: tl.constexpr, J: tl.constexpr, ACC: tl.constexpr,
              PRECISION: tl.constexpr):  # fmt: skip
    """Tap row u at the 8 J pixels of hidden: value v of column c is number v * 8 + c of 8 * KP tensors (N,)."""
    tap, ok = tap_numbers(u, block, G, K, KP, GB)
    made = tl.dot(hidden, load_weight(weight, tap, ok, R, RP), input_precision=PRECISION, out_dtype=ACC)
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
