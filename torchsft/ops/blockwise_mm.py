"""Triton kernels for products in block-wise fp8, for GPUs of SM90 on. Their plain twin is
`precision/blockwise_compute.py`, which says what is multiplied.

    quantise_rows      x in tiles of 1 x 128, or whole rows, in the order and with the zeros between
                       them that a product needs
    quantise_columns   x^T, in tiles of 128 rows of x, likewise; each expert's begin with a tile
    quantise_weight    w in blocks of 128 x 128, or its transpose
    rows_product       x w^T, each row by its expert's matrix, to any place
    columns_product    dy^T x, each expert's rows

Each product of 128 x 128 x 128 begins at 0 in the tensor cores, whose sums have 14 bits, and is
scaled and added in fp32 registers (arXiv:2412.19437, section 3.3.2). Tensor cores of SM90 take fp8
only with the inner dim contiguous; hence the transposes.

Shape suffixes: R rows sorted by expert, C columns, I inner dim, O outputs, E experts, T tiles of up
to 128 rows of one expert, M rows with zeros between them (128 T where there are tiles); i, o, c:
blocks of 128 of I, O, C.
"""

# ruff: noqa: ANN001, E741 (Triton's arguments have no Python types; sizes are capitals)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from torchsft.ops.tiles import SIZE, Tiles

LAUNCH = {"num_warps": 8, "num_stages": 4}  # of products; with 4 warps they spill registers


class Quantised(NamedTuple):
    """e4m3 values and the fp32 scales of their blocks."""

    values: Tensor
    scales: Tensor


@triton.jit
def _scale(largest, power_of_two: tl.constexpr):
    """Return scales, as `precision.blockwise.scale_of` does.

    Args:
        largest: magnitudes of the blocks, fp32.
        power_of_two: round up to powers of two.
    """
    scale = tl.where(largest == 0, 1.0, tl.div_rn(largest, 448.0))
    scale = tl.maximum(scale, 1.1754943508222875e-38)  # the smallest normal fp32
    if power_of_two:  # carried into the exponent, unless the mantissa is 0
        bits = scale.to(tl.int32, bitcast=True)
        scale = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def _encode(values, scale):
    """Return values in units of their scales, as `precision.blockwise.encode` does.

    Args:
        values: fp32.
        scale: of a shape that broadcasts.

    Returns:
        e4m3, of the shape of the values.
    """
    units = tl.div_rn(values, tl.broadcast_to(scale, values.shape))
    units = tl.clamp(units, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    return units.to(tl.float8e4nv)


@triton.jit
def _span(first, size: tl.constexpr):
    """Return the numbers from `first` on, as many as `size`."""
    return first + tl.arange(0, size)


@triton.jit
def _inside(row, rows, column, columns):
    """Return which of the entries at all rows x all columns lie within these bounds."""
    return (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def _places(row, column, width):
    """Return where the entries at all rows x all columns lie in a tensor of this many columns."""
    return row[:, None] * width + column[None, :]


@triton.jit
def _load(place, inside):
    """Return what lies at these places, and zeros where they are not inside."""
    return tl.load(place, mask=inside, other=0.0)


@triton.jit
def _rows_kernel(x, index, q, scales, M, C, power_of_two: tl.constexpr, height: tl.constexpr):
    """Quantise `height` rows of 128 columns; see `quantise_rows`.

    x is [R, C], index [M] or None, q e4m3 [M, C], scales fp32 [c, M]. Program (n, c) has the n-th
    rows and the c-th columns of q.
    """
    block = tl.program_id(1)
    row = _span(tl.program_id(0).to(tl.int64) * height, height)
    column = _span(block * 128, 128)
    inside = _inside(row, M, column, C)
    source, there = row, inside
    if index is not None:
        source = tl.load(index + row, mask=row < M, other=-1).to(tl.int64)
        there = inside & (source >= 0)[:, None]
    values = _load(x + _places(source, column, C), there).to(tl.float32)
    largest = tl.max(tl.abs(values), 1)
    scale = _scale(largest, power_of_two)  # [height]
    encoded = _encode(values, scale[:, None])
    tl.store(q + _places(row, column, C), encoded, mask=inside)
    scale_place = block.to(tl.int64) * M + row
    tl.store(scales + scale_place, scale, mask=row < M)


@triton.jit
def _whole_rows_kernel(x, index, q, scales, C, power_of_two: tl.constexpr, width: tl.constexpr):
    """Quantise one row, `width` columns at a time; see `quantise_whole_rows`.

    x is [R, C], index [M], q e4m3 [M, C], scales fp32 [M]. Program m has row m of q.
    """
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(index + row).to(tl.int64)
    end = tl.where(source >= 0, C, 0)  # a row of zeros reads nothing
    largest = tl.zeros((width,), tl.float32)
    for begin in range(0, C, width):
        column = _span(begin, width)
        values = _load(x + source * C + column, column < end)
        largest = tl.maximum(largest, tl.abs(values.to(tl.float32)))
    scale = _scale(tl.max(largest, 0), power_of_two)
    for begin in range(0, C, width):  # from the cache
        column = _span(begin, width)
        values = _load(x + source * C + column, column < end)
        encoded = _encode(values.to(tl.float32), scale)
        tl.store(q + row * C + column, encoded, mask=column < C)
    tl.store(scales + row, scale)


@triton.jit
def _columns_kernel(
    x, index, q, scales, first, end, C, M, power_of_two: tl.constexpr, width: tl.constexpr
):
    """Quantise one tile's rows of `width` columns, and transpose them; see `quantise_columns`.

    x is [N, C], index [R] or None, q e4m3 [C, M], scales fp32 [T, C]; first and end are those of
    `Tiles`. Program (t, n) has the t-th tile and the n-th columns.
    """
    tile = tl.program_id(0).to(tl.int64)
    begin = tl.load(first + tile).to(tl.int64)
    stop = tl.load(end + tile)
    if begin >= stop:  # an empty tile
        return
    row = _span(begin, 128)
    column = _span(tl.program_id(1).to(tl.int64) * width, width)
    inside = _inside(row, stop, column, C)
    source = row
    if index is not None:
        source = tl.load(index + row, mask=row < stop, other=0).to(tl.int64)
    values = _load(x + _places(source, column, C), inside)
    values = values.to(tl.float32)
    largest = tl.max(tl.abs(values), 0)
    scale = _scale(largest, power_of_two)  # [width]
    encoded = _encode(values, scale[None, :])
    # Rows beyond the expert's are written too, as zeros: the product reads whole tiles.
    row_in_tiles = _span(tile * 128, 128)
    place = _places(column, row_in_tiles, M)
    tl.store(q + place, tl.trans(encoded), mask=(column < C)[:, None])
    scale_place = tile * C + column
    tl.store(scales + scale_place, scale, mask=column < C)


@triton.jit
def _weight_kernel(w, q, scales, O, I, power_of_two: tl.constexpr, transposed: tl.constexpr):
    """Quantise one block of one expert's matrix; see `quantise_weight`.

    w is [E, O, I], q e4m3 [E, O, I] or, transposed, [E, I, O], scales fp32 [E, o, i]. Program
    (i, o, e) has that block of that expert.
    """
    block_i, block_o = tl.program_id(0), tl.program_id(1)
    expert = tl.program_id(2)
    row, column = _span(block_o * 128, 128), _span(block_i * 128, 128)
    matrix = expert.to(tl.int64) * O * I  # where it begins
    place = matrix + _places(row, column, I)
    inside = _inside(row, O, column, I)
    values = _load(w + place, inside).to(tl.float32)
    largest = tl.max(tl.max(tl.abs(values), 1), 0)
    scale = _scale(largest, power_of_two)  # one number
    encoded = _encode(values, scale)
    if transposed:
        place = matrix + _places(column, row, O)
        encoded, inside = tl.trans(encoded), tl.trans(inside)
    tl.store(q + place, encoded, mask=inside)
    blocks_i, blocks_o = tl.num_programs(0), tl.num_programs(1)
    scale_place = (expert * blocks_o + block_o) * blocks_i + block_i
    tl.store(scales + scale_place, scale)


@triton.jit
def _rows_product_kernel(
    x,
    x_scales,
    w,
    w_scales,
    y,
    target,
    first,
    expert_of,
    end,
    R,
    O,
    I,
    scale_stride_e,
    scale_stride_o,
    scale_stride_i,
):
    """Multiply one tile's rows with 128 outputs of its expert's matrix; see `rows_product`.

    x is e4m3 [R, I] with scales [i, R], w e4m3 [E, O, I] with scales [E, o, i] of the strides
    given, y [R, O], target [R] or None; first, expert_of and end are those of `Tiles`. Program
    (t, o) has the t-th tile and the o-th outputs.
    """
    tile, output = tl.program_id(0), tl.program_id(1)
    begin = tl.load(first + tile).to(tl.int64)
    stop = tl.load(end + tile)
    if begin >= stop:  # an empty tile
        return
    expert = tl.load(expert_of + tile).to(tl.int64)
    row, column = _span(begin, 128), _span(output * 128, 128)
    inner = tl.arange(0, 128)
    # Where the first block of the inner dim begins: x in rows, w as [inner, column].
    x_place = x + _places(row, inner, I)
    w_place = w + expert * O * I + column[None, :] * I + inner[:, None]
    x_scale_place = x_scales + row
    w_scale_place = w_scales + expert * scale_stride_e + output * scale_stride_o
    total = tl.zeros((128, 128), tl.float32)
    for block in range(tl.cdiv(I, 128)):
        left = I - block * 128  # of the inner dim, from this block on
        x_inside = _inside(row, stop, inner, left)
        w_inside = _inside(inner, left, column, O)
        x_block = _load(x_place + block * 128, x_inside)
        w_block = _load(w_place + block * 128, w_inside)
        product = tl.dot(x_block, w_block)
        # one scale for each row, and one for the block of w
        x_scale = _load(x_scale_place, row < stop)
        w_scale = tl.load(w_scale_place)
        scale = x_scale * w_scale
        total += product * scale[:, None]
        # those of the next block
        x_scale_place += R
        w_scale_place += scale_stride_i
    y_row = row
    if target is not None:
        y_row = tl.load(target + row, mask=row < stop, other=0).to(tl.int64)
    y_place = y + _places(y_row, column, O)
    result = total.to(y.dtype.element_ty)
    tl.store(y_place, result, mask=_inside(row, stop, column, O))


@triton.jit
def _columns_product_kernel(a, a_scales, b, b_scales, y, bounds, O, I, M):
    """Add up 128 x 128 entries of one expert's product over its tiles; see `columns_product`.

    a is e4m3 [O, M] with scales [T, O], b e4m3 [I, M] with scales [T, I], y [E, O, I]; bounds are
    those of `Tiles`. Program (i, o, e) has these entries of that expert.
    """
    row, column = _span(tl.program_id(1) * 128, 128), _span(tl.program_id(0) * 128, 128)
    expert = tl.program_id(2)
    inner = tl.arange(0, 128)  # rows of a tile
    a_place = a + _places(row.to(tl.int64), inner, M)
    b_place = b + column[None, :].to(tl.int64) * M + inner[:, None]
    # this expert's tiles
    begin = tl.load(bounds + expert)
    stop = tl.load(bounds + expert + 1)
    a_scale_place = a_scales + begin.to(tl.int64) * O + row
    b_scale_place = b_scales + begin.to(tl.int64) * I + column
    total = tl.zeros((128, 128), tl.float32)
    for tile in range(begin, stop):
        a_tile = _load(a_place + tile * 128, (row < O)[:, None])
        b_tile = _load(b_place + tile * 128, (column < I)[None, :])
        product = tl.dot(a_tile, b_tile)
        # one scale for each row of the result, and one for each column
        a_scale = _load(a_scale_place, row < O)
        b_scale = _load(b_scale_place, column < I)
        total += product * a_scale[:, None] * b_scale[None, :]
        # those of the next tile
        a_scale_place += O
        b_scale_place += I
    matrix = expert.to(tl.int64) * O * I
    y_place = y + matrix + _places(row, column, I)
    result = total.to(y.dtype.element_ty)
    tl.store(y_place, result, mask=_inside(row, O, column, I))


def quantise_rows(x_RC: Tensor, power_of_two: bool, index_M: Tensor | None = None) -> Quantised:
    """Quantise in tiles of 1 x 128, for `rows_product`.

    Args:
        x_RC: contiguous, of any floating dtype.
        power_of_two: round scales up to powers of two.
        index_M: integers, which row of x each row of the result is; -1: zeros. None: M = R, in the
            same order.

    Returns:
        e4m3 [M, C], and fp32 scales [c, M].
    """
    rows, columns = len(x_RC) if index_M is None else len(index_M), x_RC.shape[1]
    blocks = triton.cdiv(columns, SIZE)
    height = 16  # rows of a program
    q = x_RC.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = x_RC.new_empty(blocks, rows, dtype=torch.float32)
    grid = triton.cdiv(rows, height), blocks
    _rows_kernel[grid](x_RC, index_M, q, scales, rows, columns, power_of_two, height)
    return Quantised(q, scales)


def quantise_whole_rows(x_RC: Tensor, power_of_two: bool, index_M: Tensor) -> Quantised:
    """Quantise rows with one scale each; see `quantise_rows` for the arguments.

    Returns:
        e4m3 [M, C], and fp32 scales [M].
    """
    rows, columns = len(index_M), x_RC.shape[1]
    q = x_RC.new_empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = x_RC.new_empty(rows, dtype=torch.float32)
    width = 1024
    _whole_rows_kernel[(rows,)](x_RC, index_M, q, scales, columns, power_of_two, width)
    return Quantised(q, scales)


def quantise_columns(
    x_RC: Tensor, tiles: Tiles, power_of_two: bool, index_R: Tensor | None = None
) -> Quantised:
    """Quantise in tiles of 128 rows x 1, for `columns_product`.

    Args:
        x_RC: contiguous, of any floating dtype.
        tiles: of the rows.
        power_of_two: round scales up to powers of two.
        index_R: integers, which row of x each row is. None: the same.

    Returns:
        e4m3 [C, M], the transposed, and fp32 scales [T, C]; what lies in empty tiles is undefined.
    """
    columns, count = x_RC.shape[1], len(tiles.first_T)
    rows, width = SIZE * count, 64
    q = x_RC.new_empty(columns, rows, dtype=torch.float8_e4m3fn)
    scales = x_RC.new_empty(count, columns, dtype=torch.float32)
    grid = count, triton.cdiv(columns, width)
    bounds = tiles.first_T, tiles.end_T
    _columns_kernel[grid](x_RC, index_R, q, scales, *bounds, columns, rows, power_of_two, width)
    return Quantised(q, scales)


def quantise_weight(w_EOI: Tensor, power_of_two: bool, transposed: bool) -> Quantised:
    """Quantise in blocks of 128 x 128, for `rows_product`.

    Args:
        w_EOI: contiguous, of any floating dtype.
        power_of_two: round scales up to powers of two.
        transposed: return values with the inner dim O contiguous, for gradients of rows.

    Returns:
        e4m3 [E, O, I] or, transposed, [E, I, O]; and fp32 scales, [E, o, i] in either case.
    """
    experts, outputs, inputs = w_EOI.shape
    shape = (experts, inputs, outputs) if transposed else w_EOI.shape
    q = w_EOI.new_empty(shape, dtype=torch.float8_e4m3fn)
    blocks = triton.cdiv(outputs, SIZE), triton.cdiv(inputs, SIZE)
    scales = w_EOI.new_empty(experts, *blocks, dtype=torch.float32)
    grid = blocks[1], blocks[0], experts
    _weight_kernel[grid](w_EOI, q, scales, outputs, inputs, power_of_two, transposed)
    return Quantised(q, scales)


def rows_product(
    x: Quantised,
    w: Quantised,
    tiles: Tiles,
    dtype: torch.dtype,
    target_R: Tensor | None = None,
) -> Tensor:
    """Multiply each row with the matrix of its expert: x w^T.

    Args:
        x: of `quantise_rows`, [R, I].
        w: of `quantise_weight`, [E, O, I] with scales [E, o, i] of any strides.
        tiles: of the rows.
        dtype: of the result; sums are fp32.
        target_R: integers, a permutation: which row of the result each row is. None: the same.

    Returns:
        [R, O].
    """
    rows, inner = x.values.shape
    outputs = w.values.shape[1]
    y = x.values.new_empty(rows, outputs, dtype=dtype)
    grid = len(tiles.first_T), triton.cdiv(outputs, SIZE)
    sizes, strides = (rows, outputs, inner), w.scales.stride()
    _rows_product_kernel[grid](*x, *w, y, target_R, *tiles[:3], *sizes, *strides, **LAUNCH)
    return y


def columns_product(dy: Quantised, x: Quantised, tiles: Tiles, dtype: torch.dtype) -> Tensor:
    """Multiply the rows of each expert: dy^T x, zero for one without rows.

    Args:
        dy: of `quantise_columns`, [O, M].
        x: likewise, [I, M].
        tiles: of the rows.
        dtype: of the result; sums are fp32.

    Returns:
        [E, O, I].
    """
    outputs, length = dy.values.shape
    inputs = len(x.values)
    experts = len(tiles.bounds_E) - 1
    dw = dy.values.new_empty(experts, outputs, inputs, dtype=dtype)
    grid = triton.cdiv(inputs, SIZE), triton.cdiv(outputs, SIZE), experts
    sizes = outputs, inputs, length
    _columns_product_kernel[grid](*dy, *x, dw, tiles.bounds_E, *sizes, **LAUNCH)
    return dw
