# mypy: ignore-errors
"""Triton kernels of BatchNorm in training and the ReLU behind it, relu(scale x + shift [+ skip]), without a pass over
memory for anything but the sums and the result: 8 passes forward and backward where torch's operators take 13, and 11
instead of 16 with a residual.

Images are dense channels_last: x[groups][rows][C]. Each group of images is normalised by itself (ghost.py); there is
one unless more are asked for. groups * rows = B H W, and `each` programs work on a group. A program takes BC channels
of `per` rows, BR at a time. What programs have summed up lies in parts[groups][P][2][C] and is added up by `finish_*`
in one order: the same bits every time.
Sums are of distances from a channel's first value of the program, and the programs' variances are combined by Chan's
formula: no cancellation where the mean is large beside the deviation.

coefficients[groups][6][C]: mean, inverse (1 / standard deviation), scale, shift, and of the backward: slope, offset.
"""

import triton
import triton.language as tl


@triton.jit
def tile(program, start, rows, last, C, BR: tl.constexpr, BC: tl.constexpr):
    """Places (BR, BC) from row `start`, which of them are there, and the channels (BC)."""
    channel = program * BC + tl.arange(0, BC)
    row = start + tl.arange(0, BR)
    ok = (row < tl.minimum(rows, last))[:, None] & (channel < C)[None, :]
    return row.to(tl.int64)[:, None] * C + channel[None, :], ok, channel


@triton.jit
def statistics_kernel(x, parts, rows, C, per, P, chunks, each, BR: tl.constexpr, BC: tl.constexpr):
    """parts[p] = mean and sum of squared distances from it, of program p's rows."""
    pid, group = tl.program_id(0) % each, tl.program_id(0) // each
    x += group.to(tl.int64) * rows * C
    parts += group * P * 2 * C
    chunk, part = pid % chunks, pid // chunks
    first, last = part * per, tl.minimum(part * per + per, rows)
    channel = chunk * BC + tl.arange(0, BC)
    pivot = tl.load(x + first.to(tl.int64) * C + channel, mask=channel < C, other=0.0).to(tl.float32)
    sums, squares = tl.zeros((BR, BC), tl.float32), tl.zeros((BR, BC), tl.float32)
    for step in range(tl.cdiv(per, BR)):
        place, ok, _ = tile(chunk, first + step * BR, rows, last, C, BR, BC)
        distance = tl.where(ok, tl.load(x + place, mask=ok, other=0.0).to(tl.float32) - pivot[None, :], 0.0)
        sums += distance
        squares += distance * distance
    n = (last - first).to(tl.float32)
    total = tl.sum(sums, 0)
    to = parts + part * 2 * C + channel
    tl.store(to, pivot + total / n, mask=channel < C)
    tl.store(to + C, tl.sum(squares, 0) - total * total / n, mask=channel < C)


@triton.jit
def finish_statistics_kernel(parts, weight, bias, running_mean, running_var, coefficients, rows, C, per, P, groups,
                             momentum, eps, TRAINING: tl.constexpr, PP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """mean, inverse, scale and shift; in training the running statistics follow, group by group."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    there = channel < C
    running = tl.load(running_mean + channel, mask=there, other=0.0).to(tl.float32)
    running_of_var = tl.load(running_var + channel, mask=there, other=0.0).to(tl.float32)
    factor = tl.load(weight + channel, mask=there, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
    for group in range(groups):
        if TRAINING:
            part, first = tl.arange(0, PP), parts + group * P * 2 * C
            ok = (part < P)[:, None] & there[None, :]
            place = first + (part * 2 * C)[:, None] + channel[None, :]
            n = tl.where(part < P, tl.minimum(per, rows - part * per), 0).to(tl.float32)[:, None]
            means = tl.load(place, mask=ok, other=0.0)
            # about the first part's mean: a plain sum of large means would lose what the variance is made of
            pivot = tl.load(first + channel, mask=there, other=0.0)
            distance = tl.where(ok, means - pivot[None, :], 0.0)
            shift_of_mean = tl.sum(n * distance, 0) / rows
            mean = pivot + shift_of_mean
            distance = tl.where(ok, distance - shift_of_mean[None, :], 0.0)
            var = (tl.sum(tl.load(place + C, mask=ok, other=0.0), 0) + tl.sum(n * distance * distance, 0)) / rows
            running += momentum * (mean - running)
            running_of_var += momentum * (var * (rows / (rows - 1.0)) - running_of_var)
        else:
            mean, var = running, running_of_var
        inverse = 1.0 / tl.sqrt_rn(var + eps)
        scale = factor * inverse
        to = coefficients + group * 6 * C + channel
        tl.store(to, mean, mask=there)
        tl.store(to + C, inverse, mask=there)
        tl.store(to + 2 * C, scale, mask=there)
        tl.store(to + 3 * C, offset - mean * scale, mask=there)
    if TRAINING:
        tl.store(running_mean + channel, running, mask=there)
        tl.store(running_var + channel, running_of_var, mask=there)


@triton.jit
def apply_kernel(x, skip, coefficients, out, rows, C, chunks, each, BR: tl.constexpr, BC: tl.constexpr):
    """out = relu(scale x + shift [+ skip]); skip is None where there is none."""
    pid, group = tl.program_id(0) % each, tl.program_id(0) // each
    begin = group.to(tl.int64) * rows * C
    coefficients += group * 6 * C
    place, ok, channel = tile(pid % chunks, pid // chunks * BR, rows, rows, C, BR, BC)
    scale = tl.load(coefficients + 2 * C + channel, mask=channel < C, other=0.0)
    shift = tl.load(coefficients + 3 * C + channel, mask=channel < C, other=0.0)
    place += begin
    value = tl.load(x + place, mask=ok, other=0.0).to(tl.float32) * scale[None, :] + shift[None, :]
    if skip is not None:
        value += tl.load(skip + place, mask=ok, other=0.0).to(tl.float32)
    # a value that is no number stays one, as in torch's ReLU
    tl.store(out + place, tl.where(value < 0, 0.0, value), mask=ok)


@triton.jit
def gradients_kernel(grad, x, out, coefficients, masked, parts, rows, C, per, P, chunks, each,
                     BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """parts[p] = sums of g and of g (x - mean), where g is the gradient that the ReLU lets through.

    With a residual `out` says where that is, and masked = g, which is the residual's gradient; else both are None.
    """
    pid, group = tl.program_id(0) % each, tl.program_id(0) // each
    begin = group.to(tl.int64) * rows * C
    coefficients += group * 6 * C
    parts += group * P * 2 * C
    chunk, part = pid % chunks, pid // chunks
    first, last = part * per, tl.minimum(part * per + per, rows)
    channel = chunk * BC + tl.arange(0, BC)
    mean = tl.load(coefficients + channel, mask=channel < C, other=0.0)
    scale = tl.load(coefficients + 2 * C + channel, mask=channel < C, other=0.0)
    shift = tl.load(coefficients + 3 * C + channel, mask=channel < C, other=0.0)
    sums, products = tl.zeros((BR, BC), tl.float32), tl.zeros((BR, BC), tl.float32)
    for step in range(tl.cdiv(per, BR)):
        place, ok, _ = tile(chunk, first + step * BR, rows, last, C, BR, BC)
        place += begin
        values = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
        if out is None:
            g = tl.where(values * scale[None, :] + shift[None, :] <= 0, 0.0, g)  # of NaN it is let through
        else:
            g = tl.where(tl.load(out + place, mask=ok, other=0.0) <= 0, 0.0, g)
            tl.store(masked + place, g, mask=ok)
        sums += g
        products += g * (values - mean[None, :])  # g is 0 where nothing is
    to = parts + part * 2 * C + channel
    tl.store(to, tl.sum(sums, 0), mask=channel < C)
    tl.store(to + C, tl.sum(products, 0), mask=channel < C)


@triton.jit
def finish_gradients_kernel(parts, coefficients, grad_weight, grad_bias, rows, C, P, groups, TRAINING: tl.constexpr,
                            PP: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """Gradients of weight and bias, and for `apply_gradients` slope and offset: grad x = scale g + slope (x - mean) +
    offset."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    there, part = channel < C, tl.arange(0, PP)
    ok = (part < P)[:, None] & there[None, :]
    of_weight, of_bias = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    for group in range(groups):
        place = parts + group * P * 2 * C + (part * 2 * C)[:, None] + channel[None, :]
        row = coefficients + group * 6 * C + channel
        total = tl.sum(tl.load(place, mask=ok, other=0.0), 0)
        product = tl.sum(tl.load(place + C, mask=ok, other=0.0), 0)
        inverse = tl.load(row + C, mask=there, other=0.0)
        scale = tl.load(row + 2 * C, mask=there, other=0.0)
        of_weight += product * inverse
        of_bias += total
        if TRAINING:
            slope, offset = -scale * inverse * inverse * product / rows, -scale * total / rows
        else:  # the statistics do not depend on x
            slope, offset = tl.zeros_like(total), tl.zeros_like(total)
        tl.store(row + 4 * C, slope, mask=there)
        tl.store(row + 5 * C, offset, mask=there)
    tl.store(grad_weight + channel, of_weight, mask=there)
    tl.store(grad_bias + channel, of_bias, mask=there)


@triton.jit
def apply_gradients_kernel(grad, x, coefficients, out, rows, C, chunks, each, MASK: tl.constexpr,
                           BR: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """out = gradient of x. MASK: the gradient is still to pass the ReLU."""
    pid, group = tl.program_id(0) % each, tl.program_id(0) // each
    begin = group.to(tl.int64) * rows * C
    coefficients += group * 6 * C
    place, ok, channel = tile(pid % chunks, pid // chunks * BR, rows, rows, C, BR, BC)
    there, row = channel < C, coefficients + channel
    mean, scale = tl.load(row, mask=there, other=0.0), tl.load(row + 2 * C, mask=there, other=0.0)
    slope, offset = tl.load(row + 4 * C, mask=there, other=0.0), tl.load(row + 5 * C, mask=there, other=0.0)
    place += begin
    values = tl.load(x + place, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(grad + place, mask=ok, other=0.0).to(tl.float32)
    if MASK:
        shift = tl.load(row + 3 * C, mask=there, other=0.0)
        g = tl.where(values * scale[None, :] + shift[None, :] <= 0, 0.0, g)
    result = scale[None, :] * g + slope[None, :] * (values - mean[None, :]) + offset[None, :]
    tl.store(out + place, result, mask=ok)
