"""The kernels of ``conv2d``: products of matrices that exist nowhere.

A block of one is gathered when it is multiplied. Their inner axis k runs over (tap, channel),
channels fastest, which are side by side in memory. ``WINDOW``: kernel, stride, padding, dilation,
each (height, width).
"""

import triton
import triton.language as tl

from fastmaml.backends.triton.products import block_and_task, dot, tile_and_task


@triton.jit
def _patches(pixel, k, images, sizes, strides, CHANNELS: tl.constexpr, WINDOW: tl.constexpr):
    """Where element k of the window of each output pixel lies in x, and whether it does."""
    KH: tl.constexpr = WINDOW[0]  # before 3.7 Triton takes no such tuple apart by itself
    KW: tl.constexpr = WINDOW[1]
    H, W, OH, OW = sizes
    image, position = pixel // (OH * OW), pixel % (OH * OW)
    channel, tap = k % CHANNELS, k // CHANNELS
    h = ((position // OW) * WINDOW[2] - WINDOW[4])[:, None] + ((tap // KW) * WINDOW[6])[None, :]
    w = ((position % OW) * WINDOW[3] - WINDOW[5])[:, None] + ((tap % KW) * WINDOW[7])[None, :]
    inside = (image < images)[:, None] & (tap < KH * KW)[None, :]
    inside = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    start = (image * strides[1])[:, None] + (channel * strides[2])[None, :]
    return start + h * strides[3] + w * strides[4], inside


@triton.jit
def _pixels(pixel, channel, images, sizes, strides, CHANNELS: tl.constexpr):
    """Where channels of output pixels lie, and whether they do."""
    OH, OW = sizes[2], sizes[3]
    image, position = pixel // (OH * OW), pixel % (OH * OW)
    start = image * strides[1] + (position // OW) * strides[3] + (position % OW) * strides[4]
    inside = (image < images)[:, None] & (channel < CHANNELS)[None, :]
    return start[:, None] + (channel * strides[2])[None, :], inside


@triton.jit(do_not_specialize=["images"])
def product_kernel(
    x,
    w,
    x2,
    w2,
    bias,
    y,
    images,
    sizes,
    x_strides,
    w_strides,
    second_strides,
    bias_strides,
    y_strides,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Y = x * w + x2 * w2 + bias: pixels by output channels. Second operands have the strides of
    the first but for those of the tasks, ``second_strides``.
    """
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    across: tl.constexpr = (OUT_CHANNELS + COLUMNS - 1) // COLUMNS
    tile, task = block_and_task(tl.cdiv(images * sizes[2] * sizes[3], ROWS) * across)
    pixel = (tile // across) * ROWS + tl.arange(0, ROWS)
    out = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, KH * KW * CHANNELS, INNER):
        k = start + tl.arange(0, INNER)
        channel, tap = k % CHANNELS, k // CHANNELS
        at, inside = _patches(pixel, k, images, sizes, x_strides, CHANNELS, WINDOW)
        row = channel * w_strides[2] + (tap // KW) * w_strides[3] + (tap % KW) * w_strides[4]
        there = row[:, None] + (out * w_strides[1])[None, :]
        exists = (tap < KH * KW)[:, None] & (out < OUT_CHANNELS)[None, :]
        left = tl.load(x + task * x_strides[0] + at, inside, other=0.0)
        right = tl.load(w + task * w_strides[0] + there, exists, other=0.0)
        acc = dot(left, right, acc, PRECISION)
        if x2 is not None:
            left = tl.load(x2 + task * second_strides[0] + at, inside, other=0.0)
            right = tl.load(w2 + task * second_strides[1] + there, exists, other=0.0)
            acc = dot(left, right, acc, PRECISION)
    if bias is not None:
        at = task * bias_strides[0] + out * bias_strides[1]
        acc += tl.load(bias + at, out < OUT_CHANNELS, other=0.0)[None, :]
    at, inside = _pixels(pixel, out, images, sizes, y_strides, OUT_CHANNELS)
    tl.store(y + task * y_strides[0] + at, acc, inside)


@triton.jit
def _input_grad(
    program,
    programs,
    g,
    w,
    g2,
    w2,
    gx,
    images,
    sizes,
    g_strides,
    w_strides,
    second_strides,
    gx_strides,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    PHASES: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Input pixels by channels; k runs over (tap, output channel). Of each phase so many programs.

    A tap reaches an input pixel only where the stride divides their distance. So the pixels of
    one phase (their place modulo the stride) share their taps, and no others are visited.
    """
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    SH: tl.constexpr = WINDOW[2]
    SW: tl.constexpr = WINDOW[3]
    PH: tl.constexpr = WINDOW[4]
    PW: tl.constexpr = WINDOW[5]
    DH: tl.constexpr = WINDOW[6]
    DW: tl.constexpr = WINDOW[7]
    PHASES_H: tl.constexpr = PHASES[0]
    PHASES_W: tl.constexpr = PHASES[1]
    H, W, OH, OW = sizes
    phase_h, phase_w = program // programs // PHASES_W, program // programs % PHASES_W
    rows, columns = tl.cdiv(H, PHASES_H), tl.cdiv(W, PHASES_W)
    across: tl.constexpr = (CHANNELS + COLUMNS - 1) // COLUMNS
    tile, task = tile_and_task(program % programs, tl.cdiv(images * rows * columns, ROWS) * across)
    pixel = (tile // across) * ROWS + tl.arange(0, ROWS)
    image, position = pixel // (rows * columns), pixel % (rows * columns)
    h = (position // columns) * PHASES_H + phase_h
    v = (position % columns) * PHASES_W + phase_w
    exists = (image < images) & (h < H) & (v < W)
    channel = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    first_h, first_w = (phase_h + PH) % PHASES_H, (phase_w + PW) % PHASES_W
    taps_h, taps_w = tl.cdiv(KH - first_h, PHASES_H), tl.cdiv(KW - first_w, PHASES_W)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, taps_h * taps_w * OUT_CHANNELS, INNER):
        k = start + tl.arange(0, INNER)
        out, tap = k % OUT_CHANNELS, k // OUT_CHANNELS
        r, s = first_h + (tap // taps_w) * PHASES_H, first_w + (tap % taps_w) * PHASES_W
        down, right = (h + PH)[:, None] - (r * DH)[None, :], (v + PW)[:, None] - (s * DW)[None, :]
        inside = exists[:, None] & (tap < taps_h * taps_w)[None, :]
        inside = inside & (down >= 0) & (down < OH * SH) & (right >= 0) & (right < OW * SW)
        inside = inside & (down % SH == 0) & (right % SW == 0)
        at = (image * g_strides[1])[:, None] + (out * g_strides[2])[None, :]
        at += (down // SH) * g_strides[3] + (right // SW) * g_strides[4]
        row = out * w_strides[1] + r * w_strides[3] + s * w_strides[4]
        there = row[:, None] + (channel * w_strides[2])[None, :]
        known = (tap < taps_h * taps_w)[:, None] & (channel < CHANNELS)[None, :]
        a = tl.load(g + task * g_strides[0] + at, inside, other=0.0)
        b = tl.load(w + task * w_strides[0] + there, known, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if g2 is not None:
            a = tl.load(g2 + task * second_strides[0] + at, inside, other=0.0)
            b = tl.load(w2 + task * second_strides[1] + there, known, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    start = image * gx_strides[1] + h * gx_strides[3] + v * gx_strides[4]
    at = start[:, None] + (channel * gx_strides[2])[None, :]
    tl.store(gx + task * gx_strides[0] + at, acc, exists[:, None] & (channel < CHANNELS)[None, :])


@triton.jit
def _weight_grad(
    program,
    programs,
    splits,
    g,
    x,
    g2,
    x2,
    gw,
    images,
    sizes,
    g_strides,
    x_strides,
    second_strides,
    gw_strides,
    SUMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Gw ``[splits, T, ...]``: output channels by (tap, channel), each split over its part of the
    pixels. With SUMS the bias's gradient, of g alone, lies behind the weight's. Of each split so
    many programs.
    """
    KH: tl.constexpr = WINDOW[0]
    KW: tl.constexpr = WINDOW[1]
    across: tl.constexpr = (KH * KW * CHANNELS + COLUMNS - 1) // COLUMNS
    down: tl.constexpr = (OUT_CHANNELS + ROWS - 1) // ROWS
    tile, task = tile_and_task(program % programs, down * across)
    split = program // programs
    out = (tile // across) * ROWS + tl.arange(0, ROWS)
    k = (tile % across) * COLUMNS + tl.arange(0, COLUMNS)
    pixels = images * sizes[2] * sizes[3]
    part = tl.cdiv(tl.cdiv(pixels, splits), INNER) * INNER
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    out_sums = tl.zeros((ROWS,), tl.float32)
    for start in range(split * part, tl.minimum((split + 1) * part, pixels), INNER):
        pixel = start + tl.arange(0, INNER)
        there, known = _pixels(pixel, out, images, sizes, g_strides, OUT_CHANNELS)
        at, inside = _patches(pixel, k, images, sizes, x_strides, CHANNELS, WINDOW)
        a = tl.trans(tl.load(g + task * g_strides[0] + there, known, other=0.0))
        b = tl.load(x + task * x_strides[0] + at, inside, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if SUMS:
            out_sums += tl.sum(a, 1)
        if g2 is not None:
            a = tl.trans(tl.load(g2 + task * second_strides[0] + there, known, other=0.0))
            b = tl.load(x2 + task * second_strides[1] + at, inside, other=0.0)
            acc = dot(a, b, acc, PRECISION)
    channel, tap = k % CHANNELS, k // CHANNELS
    column = channel * gw_strides[3] + (tap // KW) * gw_strides[4] + (tap % KW) * gw_strides[5]
    at = (out * gw_strides[2])[:, None] + column[None, :]
    exists = (out < OUT_CHANNELS)[:, None] & (tap < KH * KW)[None, :]
    gw += split * gw_strides[0] + task * gw_strides[1]
    tl.store(gw + at, acc, exists)
    if SUMS:
        behind: tl.constexpr = OUT_CHANNELS * CHANNELS * KH * KW
        if tile % across == 0:
            tl.store(gw + behind + out, out_sums, out < OUT_CHANNELS)


@triton.jit(do_not_specialize=["images", "of_phase", "of_split", "splits"])
def gradients_kernel(
    g,
    w,
    g2,
    w2,
    gx,
    h,
    x,
    h2,
    x2,
    gw,
    images,
    sizes,
    of_phase,
    of_split,
    splits,
    g_strides,
    w_strides,
    second_strides,
    gx_strides,
    h_strides,
    x_strides,
    second_x_strides,
    gw_strides,
    SUMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    OUT_CHANNELS: tl.constexpr,
    WINDOW: tl.constexpr,
    PHASES: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
):
    """The weight's gradient by the first programs, the input's by the others: they depend on the
    same, not on each other, and one of them seldom fills a GPU. Programs start in this order, and
    those of the weight are the longest. ``BLOCK``: rows, columns, inner.
    """
    program, weights = tl.program_id(0), of_split * splits
    if program < weights:
        if gw is not None:
            _weight_grad(
                program, of_split, splits, h, x, h2, x2, gw, images, sizes,
                h_strides, x_strides, second_x_strides, gw_strides,
                SUMS, CHANNELS, OUT_CHANNELS, WINDOW, PRECISION,
                WEIGHT_BLOCK[0], WEIGHT_BLOCK[1], WEIGHT_BLOCK[2],
            )  # fmt: skip
    else:
        if gx is not None:
            _input_grad(
                program - weights, of_phase, g, w, g2, w2, gx, images, sizes,
                g_strides, w_strides, second_strides, gx_strides,
                CHANNELS, OUT_CHANNELS, WINDOW, PHASES, PRECISION, BLOCK[0], BLOCK[1], BLOCK[2],
            )  # fmt: skip
